"""Ratios are written at the end of a session of benches, and the comparison finds those that became worse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPARE = HERE / "compare.py"


def written(file, ratios):
    place = {"processor": "one", "threads": 1, "load": 0.1}
    file.write_text(json.dumps({"commit": "0123", "environment": place, "ratios": ratios}), encoding="utf-8")
    return file


def compare(*files):
    done = subprocess.run([sys.executable, str(COMPARE), *map(str, files)], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("now", "status", "said"),
    [
        ({"a": 1.19, "b": 2.0}, 0, ["+19%", "+0%", "0 of 2"]),
        ({"a": 1.21, "b": 2.0}, 1, ["WORSE", "1 of 2"]),
        ({"a": 0.5, "b": 1.0}, 0, ["-50%", "0 of 2"]),
        ({"a": 1.0, "c": 9.0}, 0, ["not measured", "new", "0 of 2"]),
    ],
)
def test_what_is_20_percent_worse_is_found(tmp_path, now, status, said):
    baseline = written(tmp_path / "baseline.json", {"a": 1.0, "b": 2.0})
    code, text = compare(written(tmp_path / "bench.json", now), baseline)
    assert code == status
    assert all(words in text for words in said), text


def test_a_file_that_is_not_there_is_named(tmp_path):
    code, text = compare(tmp_path / "bench.json", written(tmp_path / "baseline.json", {"a": 1.0}))
    assert code == 2
    assert "bench.json is not there; `make bench`" in text


def test_a_session_writes_what_its_benches_record(tmp_path):
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_it.py").write_text("def test_it(record):\n    record('a / b', 1.23456)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert found["ratios"] == {"a / b": 1.2346}
    assert {"processor", "threads", "versions", "load"} <= set(found["environment"])
    assert "commit" in found


def test_the_baseline_is_one():
    baseline = json.loads((HERE / "baseline.json").read_text(encoding="utf-8"))
    assert len(baseline["ratios"]) > 5
    assert all(ratio > 0 for ratio in baseline["ratios"].values())
    assert compare(HERE / "baseline.json", HERE / "baseline.json")[0] == 0
