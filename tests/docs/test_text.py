"""docs/text.md is true: each block runs, with a real transformer."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from bdistil import ProgressiveEnsemble
from bdistil.storage.run_directory import RunDirectory

GUIDE = (Path(__file__).parents[2] / "docs" / "text.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
QUIET = 'max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False'

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """The names of the page after all its blocks, word for word but for the epochs."""
    folder, names = tmp_path_factory.mktemp("text"), {"__name__": "guide"}
    code = "\n".join(PYTHON).replace("max_epochs=10", QUIET)
    assert code.count(QUIET) == 1
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and tokenizers warn about themselves
        patch.chdir(folder)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        torch.manual_seed(0)
        exec(compile(code, "text.md", "exec"), names)
    return folder / "runs" / "text", names


def test_its_python_runs(guide):
    folder, names = guide
    run = RunDirectory(folder)
    assert run.committed() == len(names["ensemble"]) >= 2
    rows = run.rows()
    assert rows[0]["macs"] > 20 * rows[1]["macs"] > 0
    assert rows[-1]["rms_error"] < rows[1]["rms_error"]  # of the prefix to the transformer
    assert not run.read("teacher")["uncounted"]


def test_the_costs_are_those_of_the_first_sample(guide):
    folder, names = guide
    steps = len(names["sentences"](400, 0)[0]["input_ids"])
    assert RunDirectory(folder).rows()[1]["macs"] == steps * 8 * 8 + 8 * 2


def test_any_length_and_any_padding_is_answered_alike(guide):
    folder, names = guide
    ensemble = ProgressiveEnsemble.load(folder, student=names["make_student"])
    texts = ["good film", "the plot is not very good and the music is poor and bad and bad and a bad scene"]
    alone = torch.cat([ensemble(names["tokenizer"]([text], return_tensors="pt")) for text in texts])
    torch.testing.assert_close(ensemble(names["tokenizer"](texts, padding=True, return_tensors="pt")), alone)


def test_its_blocks_are_at_most_20_lines():
    assert max(len(block.strip().splitlines()) for block in PYTHON) <= 20
