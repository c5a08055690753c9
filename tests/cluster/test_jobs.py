"""The shipped jobs as files: found where bdistil is installed, sound bash, and alike where they do the same."""

import re
import subprocess
from pathlib import Path

import pytest

from bdistil.cli.app import main
from bdistil.cli.recipe_files import jobs

NAMES = ["one_node", "several_nodes", "torchrun"]


@pytest.mark.parametrize("path", [*jobs(), Path(__file__).with_name("one_node_slurm.sh")], ids=lambda path: path.stem)
def test_bash_can_read_it(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_recipes_lists_the_jobs(capsys):
    assert main(["recipes"]) == 0
    shown = [Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".sbatch")]
    assert [path.stem for path in shown if path.is_file()] == NAMES


@pytest.mark.parametrize("path", jobs(), ids=lambda path: path.stem)
def test_a_job_is_safe_to_requeue(path):
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    assert {key: options[key] for key in ("signal", "requeue", "open-mode")} == {
        "signal": "B:SIGUSR1@120", "requeue": "", "open-mode": "append"
    }  # fmt: skip
    assert "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID" in text, "a requeued job keeps both"
    first = jobs()[0].read_text()
    for part in (r"^asked=\n.*\n", r"^step=\$!\n.*\n", r"^if \[\[ -n(?:.*\n)+"):
        assert re.search(part, text, re.M)[0] == re.search(part, first, re.M)[0]
