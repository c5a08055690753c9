"""The recipe `diabetes`: R² of the prefixes and of the teacher over three seeds; prints the table of its header."""

from itertools import pairwise

import numpy as np
import pytest

from bdistil.cli.app import main
from bdistil.storage.run_directory import RunDirectory

SEEDS = 3


@pytest.mark.slow
def test_prefixes_of_a_regression_come_near_their_teacher(tmp_path, capsys):
    curves = []
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        common = ["--run_dir", str(folder), "--tracking.mode", "disabled", "--trainer.accelerator", "cpu"]
        assert main(["fit", "--config", "diabetes", "--seed_everything", str(seed), *common]) == 0
        curves.append(RunDirectory(folder).read_curve())
    stages = min(len(rows) for rows in curves) - 1
    columns = ("test_accuracy", "val_accuracy", "val_loss", "rms_error", "macs")
    with capsys.disabled():
        print(f"\nrounds: {[len(rows) - 1 for rows in curves]}, MACs {[int(r['macs']) for r in curves[0]]}")
        for name in columns:
            chosen = [[*rows[: stages + 1], rows[-1]] for rows in curves]
            table = np.array([[float(row[name] or "nan") for row in rows] for rows in chosen])
            labels = ["teacher", *range(1, stages + 1), "last"]
            for label, mean, sd in zip(labels, table.mean(0), table.std(0, ddof=1), strict=True):
                print(f"{name:<14} {label:>7} {mean:8.3f} ± {sd:.3f}")
    for rows in curves:
        teacher, *prefixes = rows
        assert all(float(b["rms_error"]) < float(a["rms_error"]) for a, b in pairwise(prefixes))
        assert float(prefixes[-1]["val_accuracy"]) > float(teacher["val_accuracy"]) - 0.05
        assert float(prefixes[-1]["macs"]) < float(teacher["macs"]) / 4
