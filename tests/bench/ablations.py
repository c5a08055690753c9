"""Changes one setting of cifar10-tiny at a time and writes docs/ablations.md: ablations.py --data ROOT.

Every variant is a `bdistil compare --methods bdistil`, which goes on where it was interrupted. Its figures are kept in
tests/bench/cells/cifar10-ablations.csv; a variant with all its seeds there is not trained again. The recipe itself, and
the game with kappa = 0, are `bdistil` and `links_only` of docs/results.md: --results FOLDER takes their figures over.
"""

import argparse
import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import torch
from scipy.stats import t

from bdistil.reporting.axes import BLUE, ORANGE, draw, panels_figure
from bdistil.reporting.tables import format_count

HERE = Path(os.path.relpath(Path(__file__).resolve().parent))  # paths of options stand in the comparison
DOCS = HERE.parent.parent / "docs"
KEPT = HERE / "cells" / "cifar10-ablations.csv"
SEEDS, RECIPE, BASE, LONG = 3, "cifar10-tiny", "recipe", "rounds-12"
COLUMNS = ("seed", "prefix", "macs", "train_macs", "seconds", "val_accuracy", "test_accuracy")


def later(rung):
    return {"ladder": f"[{{links: 0}}, {{{rung}}}]"}


# Name, what it changes, options of `bdistil fit`.
VARIANTS = (
    (LONG, "the recipe, up to 12 students", {"rounds": 12}),
    ("views-1", "one view: the images as they are", {"views": 1}),
    ("views-2", "two views", {"views": 2}),
    ("views-8", "eight views", {"views": 8}),
    ("links-none", "no links: averaged students", {"ladder": "[{links: 0}]"}),
    ("links-concat", "features, joined (`concat`)", later("links: 1")),
    ("links-hidden", "features, with a hidden layer (`hidden`)", later("links: 1, kind: hidden")),
    ("links-deep", "activations at each stage (`deep`)", later("links: 1, kind: deep")),
    ("links-start", "starts from the 16x16 map (`start`, `at: 1`)", later("links: 1, kind: start, at: 1")),
    ("links-at-2", "starts from the 8x8 map (`deep`, `at: 2`)", later("links: 1, kind: deep, at: 2")),
    ("game", "the game, κ = 1, η = 0.5 (defaults)", {"loss": "game"}),
    ("game-kappa-0", "the game, κ = 0, η = 0.5 (`links_only`)", {"loss": "game", "kappa": 0}),
    ("game-kappa-2", "the game, κ = 2, η = 0.5", {"loss": "game", "kappa": 2}),
    ("game-eta-0.1", "the game, κ = 1, η = 0.1", {"loss": "game", "eta": 0.1}),
    ("game-eta-2", "the game, κ = 1, η = 2", {"loss": "game", "eta": 2}),
)  # fmt: skip
GROUPS = {"Views of a training image": "views", "Links to the student before": "links", "Loss": "game"}
HEAD = """# Ablations

CIFAR-10 (JPEG copies), recipe `cifar10-tiny`, with one setting changed at a time. `python tests/bench/ablations.py
--data ROOT` writes every number on this page, from trainings of `bdistil compare`. They share one teacher (84.0 % on
the test part, 40.8M MACs) and train each student for 20 epochs. Accuracies are in %, mean ± sd over the seeds; the
recipe was not changed after these figures.

In short: views of the images matter most (5.9 points with two students), then students that start from activations:
4.3 to 5.1 points above averaged students and links to features, which cost 0.6 times as much. Links to features do
not help here, activations at each stage a little. Error correction is worth 1.9 points (the game with κ = 1 against κ
= 0). The divergence of the whole prefix makes the first student better, by 2.3 points, and changes nothing at the
second one. With up to 12 students allowed, boosting stops after five or six: no class of the next one lowers the
error to the teacher by 0.2 %. The last rows of the first table include the cost of the rejected students.

The same seed on another kind of processor gives another first student, within the spread.
"""


def measure(name, changes, output, data):
    """Trains the cells of a variant, as far as they have not been, and keeps their figures."""
    folder = output / name
    options = {"rounds": 2, **changes}
    command = [sys.executable, "-m", "bdistil.cli", "compare", "--config", RECIPE, "--output", str(folder)]
    command += ["--methods", "bdistil", "--seeds", str(SEEDS), "--data.root", data]
    command += ["--model.teacher.checkpoint", str(HERE / "cifar10-teacher.safetensors")]
    command += [text for key, value in options.items() for text in (f"--model.boosting.{key}", str(value))]
    subprocess.run(command, check=True, env={**os.environ, "WANDB_MODE": "disabled"})
    keep(name, folder)
    for ledger in folder.glob("runs/*/ledger"):  # some 5 GB each
        shutil.rmtree(ledger)


def keep(name, folder, method="bdistil"):
    """Replaces the rows of a variant in KEPT by those of a comparison."""
    with (folder / "compare.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == method]
    new = [{"variant": name, **{key: row[key] for key in COLUMNS}} for row in rows]
    others = [row for row in kept() if row["variant"] != name]
    with KEPT.open("w", newline="") as file:
        table = csv.DictWriter(file, ("variant", *COLUMNS))
        table.writeheader()
        table.writerows(sorted([*others, *new], key=lambda row: (row["variant"], int(row["seed"]), int(row["prefix"]))))


def kept():
    if not KEPT.exists():
        return []
    with KEPT.open() as file:
        return list(csv.DictReader(file))


def figures(variant):
    """{prefix: {seed: row}} of a variant, with numbers in place of text."""
    found = {}
    for row in kept():
        if row["variant"] == variant:
            seed = int(row["seed"])
            numbers = {key: float(row[key]) for key in COLUMNS[2:]}
            found.setdefault(int(row["prefix"]), {})[seed] = numbers
    return found


def percent(rows, part):
    """Mean ± sd over the seeds."""
    values = [100 * row[f"{part}_accuracy"] for row in rows.values()]
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def gain(rows, base):
    """Mean difference in test accuracy to `base` in points, paired over the seeds, with its 95 % interval."""
    gaps = [100 * (rows[seed]["test_accuracy"] - base[seed]["test_accuracy"]) for seed in rows.keys() & base.keys()]
    if len(gaps) < 2:
        return f"{gaps[0]:+.1f}" if gaps else "–"
    half = t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
    return f"{fmean(gaps):+.1f} [{fmean(gaps) - half:+.1f}, {fmean(gaps) + half:+.1f}]"


def mean(rows, key):
    return fmean(row[key] for row in rows.values())


def table(head, rows):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def rounds_section():
    """Accuracy, MACs and training cost of 1 to 12 students; the picture of it."""
    found = figures(LONG)
    rows = []
    for prefix, seeds in sorted(found.items()):
        added = gain(seeds, found[prefix - 1]) if prefix > 1 else ""
        costs = format_count(mean(seeds, "macs")), format_count(mean(seeds, "train_macs"))
        minutes = f"{mean(seeds, 'seconds') / 60:.0f}"
        rows.append([prefix, len(seeds), percent(seeds, "val"), percent(seeds, "test"), added, *costs, minutes])
    picture(found)
    head = ["students", "seeds", "validation", "test", "gained on the test part", "MACs", "training MACs", "minutes"]
    return f"## Rounds\n\n![Accuracy over the number of students](ablations-rounds.png)\n\n{table(head, rows)}"


def picture(found):
    title = "CIFAR-10: accuracy in % on the validation part (orange) and the test part (blue)"
    figure, (axes,) = panels_figure(7.5, 3.6, {title: 1})
    for part, colour in (("val", ORANGE), ("test", BLUE)):
        points = [(n, 100 * mean(seeds, f"{part}_accuracy")) for n, seeds in sorted(found.items())]
        draw(axes, points, "o-", colour)
    axes.set(xticks=sorted(found), xlabel="students")
    figure.savefig(DOCS / "ablations-rounds.png", dpi=150)


def variants_section(heading, prefix):
    """One row for the recipe and each of its variants with a name of this prefix."""
    base = figures(BASE)
    rows = [variant_row("the recipe", base, base)]
    rows += [variant_row(text, figures(name), base) for name, text, _ in VARIANTS if name.startswith(prefix)]
    head = ["", "seeds", "1 student", "2 students", "MACs", "2 students against the recipe", "training MACs"]
    return f"## {heading}\n\n{table(head, [row for row in rows if row])}"


def variant_row(text, found, base):
    """The row of a variant, or nothing if it was not measured."""
    if 2 not in found:
        return []
    against = "" if found == base else gain(found[2], base[2])
    costs = format_count(mean(found[2], "macs")), against, format_count(mean(found[2], "train_macs"))
    return [text, len(found[2]), percent(found[1], "test"), percent(found[2], "test"), *costs]


def write_page():
    """The page of what was measured; variants that were not are named at its end."""
    rows = kept()
    hours = sum(max(float(r["seconds"]) for r in rows if (r["variant"], r["seed"]) == cell) for cell in
                {(r["variant"], r["seed"]) for r in rows}) / 3600  # fmt: skip
    sections = [rounds_section(), *(variants_section(*group) for group in GROUPS.items())]
    missing = [name for name, *_ in VARIANTS if len(figures(name).get(2, {})) < SEEDS]
    sections += [f"Not measured with {SEEDS} seeds yet: {', '.join(missing)}."] if missing else []
    cost = f"All trainings together took {hours:.1f} hours, one thread each; torch {torch.__version__}."
    (DOCS / "ablations.md").write_text("\n\n".join([HEAD.strip(), cost, *sections]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--data", default="data")
    parser.add_argument("--only", nargs="*", help="names of variants; the page has all that were ever measured")
    parser.add_argument("--report_only", action="store_true", help="write what is measured so far; train nothing")
    parser.add_argument("--results", type=Path, help="folder of the comparison cifar10-tiny of results.py")
    given = parser.parse_args()
    if given.results:
        keep(BASE, given.results)
        keep("game-kappa-0", given.results, "links_only")
    for name, _, changes in VARIANTS:
        if given.report_only and (given.output / name / "compare.csv").exists():
            keep(name, given.output / name)
        done = len(figures(name).get(2, {})) >= SEEDS
        if not (given.report_only or done) and (given.only is None or name in given.only):
            measure(name, changes, given.output, given.data)
    write_page()


if __name__ == "__main__":
    main()
