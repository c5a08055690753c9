"""Measures what docs/results.md says and writes it: results.py [--output runs/results] [--data ROOT] [--only NAME ...].

Each part is a `bdistil compare`, which goes on where it was interrupted; the page is written when all of them are
complete, or with --report_only. With --only, the sections of other parts stay as they are on the page; parts that it
lacks are named there, and so are methods and seeds that a section lacks.
"""

import argparse
import csv
import os
import platform
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

from bdistil.comparison.report import markdown

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))  # paths of options stand on the page
DOCS = HERE.parent.parent / "docs"
OTHERS = ("no_resched", "resched", "links_only", "residual", "joint")
ALL = f"bdistil {' '.join(OTHERS)}"
# Name, heading, recipe, seeds, methods, options; {data} is the folder of --data.
PARTS = (
    ("vowels", "JapaneseVowels: CNN to GRU students", "vowels", 5, ALL, ""),
    ("diabetes", "Diabetes: a regression", "diabetes", 5, ALL, ""),
    ("watch", "Smartwatch gestures", "watch", 5, ALL, ""),
    ("digits", "5,000 digits of MNIST", "digits", 5, ALL, ""),
    ("fsdd", "Spoken digits (FSDD)", str(HERE / "fsdd.yaml"), 5, ALL, "--data.file {data}/fsdd.npz"),
    (
        "fsdd-start", "Spoken digits, students that start from activations", str(HERE / "fsdd-start.yaml"), 3,
        "bdistil no_resched joint", "--data.file {data}/fsdd.npz",
    ),
    ("mnist", "All of MNIST", str(HERE / "mnist.yaml"), 5, ALL, "--data.root {data}"),
    (
        "cifar10-tiny", "CIFAR-10", "cifar10-tiny", 3, ALL,
        f"--data.root {{data}} --model.teacher.checkpoint {HERE}/cifar10-teacher.safetensors",
    ),
)  # fmt: skip
# This one takes hours: the figures of its cells are kept, so that another machine goes on with them.
LONG, CELLS = "cifar10-tiny", HERE / "cells"
MISSING = "Not measured:"
HEAD = """# Results

Every number on this page is written by one command, `python tests/bench/results.py --data ROOT`, or with `--only NAME`
for a section: the students of a recipe by several methods (`bdistil compare`, see [Comparisons](compare.md)), on the
same data, teacher, optimizer and epochs, at the commits that the section names (a + marks uncommitted changes). Models
are selected on the validation part; only the settings of the recipe `digits` were once chosen with test accuracies in
view. Cases where bdistil loses are included. Times are rough, as other programs were running.

All methods and seeds of a section share one teacher. Figures of the same recipes in README and in [Students that build
on activations](activations.md#figures) differ a little: they are from other commits and seeds, and on the embedded data
each seed trains a teacher of its own.

Differences of bdistil to each method at bdistil's MACs, in percentage points of test accuracy (Diabetes: R²), with two
students and with as many as every seed has. In bold: the 95 % interval over the seeds excludes 0, without a correction
for the number of comparisons. The intervals are in the sections below, the meaning of the methods is in
[Comparisons](compare.md).

{summary}

In short: from the second student on, bdistil is 1 to 16 points above independent students that are averaged
(`resched`), except on JapaneseVowels and Diabetes, where it is level. One larger student of the same MACs
(`no_resched`) is level with it where students read features, and below it where they start from activations: by 1.3
to 1.5 points on CIFAR-10 and by 2.4 to 4.8 on spoken digits; with three seeds, as in both cases, most of the
intervals include 0. Fitting the residual alone (`residual`) is level; leaving the error correction out (`links_only`)
costs 0.4 to 5.5 points on images, sensor data and spoken digits. Joint training has the worse first student on most
data; with more students it is level, except on CIFAR-10, where it is 1.4 to 2.5 points better, and on spoken digits
with activations, where it is about a point better from four students on.

Measured elsewhere: [CIFAR-10](activations.md#cifar-10) beside the oracle and links to features, with [one setting
changed at a time](ablations.md), spoken digits by
[other links and losses](activations.md#spoken-digits),
[black-box teachers](mekd.md#figures), [wrong labels](noisy-labels.md#figures), [gradient noise](gradient-noise.md),
and [other packages](peers.md).

"""


def measure(part, output, data, report_only=False):
    """Runs one comparison, as far as it has not been run; its figures are kept in CELLS if it is LONG."""
    name, _, recipe, seeds, methods, options = part
    folder, kept = output / name, CELLS / f"{name}.tar.gz"
    command = [sys.executable, "-m", "bdistil.cli", "compare", "--config", recipe, "--output", str(folder)]
    command += ["--seeds", str(seeds), "--methods", *methods.split(), *options.format(data=data).split()]
    command += ["--report_only", "true"] if report_only else []
    if kept.exists() and not folder.exists():
        with tarfile.open(kept) as archive:
            archive.extractall(folder, filter="data")
    try:
        subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "disabled"})
    finally:
        if name == LONG:
            keep(folder, kept)


def keep(folder, kept):
    """Packs what a comparison needs to go on: the teacher, and the small files of the cells that are done."""
    done = [file.parent for file in sorted(folder.glob("runs/*/figures.json"))]
    names = ("config.yaml", "figures.json", "environment.json", "rounds/*/*.json")
    files = [*folder.glob("*.json"), folder / "recipe.yaml", *folder.glob("runs/teacher-seed0/teacher.safetensors")]
    files += [file for cell in done for name in names for file in cell.glob(name)]
    kept.parent.mkdir(exist_ok=True)
    with tarfile.open(kept, "w:gz") as archive:
        for file in files:
            archive.add(file, file.relative_to(folder))


def minutes(folder):
    """Minutes of training of all cells; the rows of a cell are in the order of its prefixes, the last has its time."""
    with (folder / "compare.csv").open() as file:
        whole = {(row["cell"], row["seed"]): float(row["seconds"]) for row in csv.DictReader(file)}
    return sum(whole.values()) / 60


def lacking(part, folder):
    """A sentence on the methods and seeds of a part that were not measured yet, or nothing."""
    _, _, _, seeds, methods, _ = part
    with (folder / "compare.csv").open() as file:
        there = {(row["method"], row["seed"]) for row in csv.DictReader(file)}
    found = {name: sum(method == name for method, _ in there) for name in methods.split()}
    short = {name: count for name, count in found.items() if count < seeds}
    missing = [f"{name} ({seeds - count} of {seeds} seeds)" if count else name for name, count in short.items()]
    return f" Not measured yet: {', '.join(missing)}." if missing else ""


def section(part, folder):
    _, heading, recipe, *_ = part
    picture = f"results-{folder.name}.png"
    (DOCS / picture).write_bytes((folder / "compare-macs.png").read_bytes())
    text = (folder / "compare.md").read_text()
    trained = f"{minutes(folder):.0f} minutes of training"
    intro = f"Recipe `{recipe}`, {trained}; {environment()}.{lacking(part, folder)}"
    return f"{heading}\n\n{intro}\n\n![Test figures of every method over MACs]({picture})\n\n{text}\n"


def environment():
    return f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} processors"


def sections():
    """The sections of the page as it is, without the mark of their heading, by heading."""
    page = (DOCS / "results.md").read_text().partition(f"\n{MISSING}")[0]
    return {text.partition("\n")[0]: text for text in page.split("\n## ")[1:]}


def summary(found):
    """The differences of bdistil to the other methods with two students and with all of them, from every section."""
    lines = []
    for _, heading, *_ in PARTS:
        header, *rows = table_of_differences(found[heading]) if heading in found else [[]]
        complete = [row for row in rows if not any("seeds" in cell for cell in row)]
        for row in dict.fromkeys(map(tuple, complete[1:2] + complete[-1:])):
            gaps = dict(zip(header, row, strict=True))
            lines.append([heading.partition(":")[0], row[0].split()[0], *(short(gaps.get(o, "–")) for o in OTHERS)])
    return markdown((["data", "students", *OTHERS], lines))


def table_of_differences(text):
    """Header and rows of the last table of a section."""
    table = [line for line in text.split("\n\n")[-1].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [cells[0], *cells[2:]]


def short(cell):
    """A difference without its interval, in bold if that excludes 0."""
    mean, *interval = re.findall(r"[-+][\d.]+", cell) or ["–"]
    sure = interval and float(interval[0]) * float(interval[1]) > 0
    return f"**{mean}**" if sure else mean


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/results"))
    parser.add_argument("--data", default="data")
    parser.add_argument("--only", nargs="*", help="names of parts; the sections of the others stay as they are")
    parser.add_argument("--report_only", action="store_true", help="write what is measured so far; train nothing")
    given = parser.parse_args()
    parts = [part for part in PARTS if given.only is None or part[0] in given.only]
    for part in parts:
        measure(part, given.output, given.data, given.report_only)
    write_page(sections() | {part[1]: section(part, given.output / part[0]) for part in parts})


def write_page(found):
    """The page of all sections that there are, in the order of the parts."""
    there = [f"## {found[heading].strip()}" for _, heading, *_ in PARTS if heading in found]
    missing = [name for name, heading, *_ in PARTS if heading not in found]
    there += [f"{MISSING} {', '.join(missing)}."] if missing else []
    head = HEAD.strip().format(summary=summary(found))
    (DOCS / "results.md").write_text("\n\n".join([head, *there]) + "\n")


if __name__ == "__main__":
    main()
