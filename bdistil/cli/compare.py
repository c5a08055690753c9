"""`bdistil compare`: trains the students of a recipe by several methods and reports the differences."""

from __future__ import annotations

import difflib
import platform
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from bdistil.boosting.checks.data import TEST
from bdistil.boosting.costs import is_api
from bdistil.callbacks import LossMixing
from bdistil.cli.distiller import Distiller
from bdistil.cli.fit import BoostCLI, run_fit
from bdistil.cli.recipe_files import find_recipe
from bdistil.comparison.folder import RECIPE, begun, check_same, freeze, in_use
from bdistil.comparison.methods import MEANING, METHODS, TEACHER, Cell, Method, cells_of, check_methods
from bdistil.comparison.origin import Origin, check_split, check_start, origin_of, parts_of
from bdistil.comparison.report import Unit, difference_table, summary_table, write_comparison
from bdistil.comparison.running import CellRunner, is_done
from bdistil.comparison.students import PlannedStudents, equal_macs_note, latencies, plan_students, with_widths
from bdistil.comparison.tables import gather, methods_of, rungs_of
from bdistil.data.loaders import LOADERS
from bdistil.errors import UserError
from bdistil.reporting.tables import TextTable, format_table
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.wrappers import comes_trained
from bdistil.utils.paths import user_path
from bdistil.utils.signals import StopSignals

COMPARE_SUMMARY = "Compare bdistil with other ways to train the same students, on the same data and teacher."
# Options that the comparison sets for each training, and the option of `compare` that determines them.
SET = {"run_dir": "output", "seed_everything": "seeds"}


@dataclass(frozen=True)
class Inputs:
    """What a comparison takes from its recipe.

    Attributes:
        model: teacher, students and settings.
        parts: loaders by the name of the method that returned them.
        x: example batch (1, ...), on which MACs are counted as in a run.
        tracking: settings of the W&B run.
        mixes: whether the recipe has a LossMixing.
        trains_teacher: whether the first cell trains the teacher.
    """

    model: Distiller
    parts: Mapping[str, Any]
    x: Any
    tracking: Tracking
    mixes: bool
    trains_teacher: bool

    @cached_property
    def origin(self) -> Origin:
        """Content of origin.json; reads all test labels."""
        return origin_of(self.parts, self.model.teacher)


class PlanCLI(BoostCLI):
    """Reads a recipe for a comparison; trains nothing."""

    inputs: Inputs

    def fit(self, model: Distiller, datamodule: LightningDataModule) -> None:
        """Collects the inputs of the comparison.

        Raises:
            UserError: the recipe cannot be compared.
        """
        self.check(model)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError("Expected whole trainings, got `trainer.fast_dev_run`, of which nothing is kept.")
        if self.trainer.world_size > 1:
            raise UserError(
                f"Expected one process for each training, got {self.trainer.world_size}. Give --trainer.devices 1; "
                "--workers trains several seeds at a time."
            )
        if model.mekd is not None:
            raise UserError(
                "Expected a recipe with a teacher at hand, got one with `model.mekd`, a teacher behind an API."
            )
        if is_api(model.teacher.network):
            raise UserError("Expected a teacher at hand, got one behind an API, whose queries are for training.")
        parts = parts_of(datamodule, model.boosting)
        train = parts[LOADERS[0]]
        if model.boosting.labels is None or parts[TEST] is None:
            missing = "labels (model.boosting.labels: null)" if model.boosting.labels is None else "a test_dataloader"
            raise UserError(
                f"Expected data with labels and a test part, to compare methods, got some without {missing}."
            )
        self.inputs = Inputs(
            model,
            parts,
            x=train.collate_fn([train.dataset[0]])[0],
            tracking=self.config_init.tracking,
            mixes=any(isinstance(callback, LossMixing) for callback in self.callbacks()),
            trains_teacher=not (comes_trained(model.teacher.network) or model.teacher.checkpoint),
        )


def run_compare(args: Sequence[str]) -> None:
    """Runs the command; options it does not know are those of `bdistil fit`."""
    given, rest = _parser().parse_known_args(args)
    options = [part for arg in rest for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    _check_options(options, [*vars(given)])
    if len(given.config) > 1:
        raise UserError("Expected one `--config`, got several. Put them into one file; other options may follow.")
    if given.seeds < 1 or given.workers < 1:
        raise UserError(f"Expected `seeds` and `workers` >= 1, got {given.seeds} and {given.workers}.")
    methods = re.findall(r"\w+", " ".join(given.methods))  # also with commas and brackets, as other lists
    _compare(given, check_methods(methods), options)


def _parser() -> ArgumentParser:
    methods = ". ".join(f"{method}: {meaning}" for method, meaning in MEANING.items())
    parser = ArgumentParser(
        prog="bdistil compare",
        description=f"{COMPARE_SUMMARY} All other options are those of `bdistil fit`, and hold for every training. "
        "The same command resumes an interrupted comparison; more methods and seeds may be added.",
        epilog=f"Methods: {methods}. Example: bdistil compare --config digits --methods bdistil no_resched joint "
        "--seeds 3 --output compare-digits",
        allow_abbrev=False,
    )
    add = parser.add_argument
    recipe = "Recipe: a YAML file, or a name that `bdistil recipes` lists."
    add("--config", required=True, action="append", metavar="RECIPE", help=recipe)
    add("--output", required=True, help="Folder of the runs, compare.csv, compare.md, the pictures and report.html.")
    add("--methods", nargs="+", default=METHODS, metavar="METHOD", help="Methods to compare; all by default.")
    add("--seeds", type=int, default=5, help="Number of seeds, from 0; 5 by default.")
    add("--workers", type=int, default=1, help="Processes, among which torch's threads are divided; 1 by default.")
    only = "Train nothing: report the trainings that are finished, also while others run."
    add("--report_only", type=str.lower, choices=("true", "false"), default="false", help=only)
    return parser


def _check_options(options: Sequence[str], own: Sequence[str]) -> None:
    """Raises UserError for options of `fit` that would be overridden, and for misspelt ones of `compare`, `own`."""
    for name in (option.removeprefix("--") for option in options if option.startswith("--")):
        if name in SET:
            raise UserError(f"`--{name}` is set by the comparison for each training: give `--{SET[name]}` instead.")
        if "." not in name and (near := difflib.get_close_matches(name, own, 1, 0.75)):
            raise UserError(f"Expected an option of compare or fit, got `--{name}`. Did you mean `--{near[0]}`?")


def _compare(given: Any, methods: Sequence[Method], options: Sequence[str]) -> None:
    recipe, output = find_recipe(given.config[0]), user_path(given.output, "output")
    report_only = given.report_only == "true"
    text = recipe.read_text(encoding="utf-8")
    check_same(output, text, options)
    if report_only and not begun(output):
        raise UserError(
            f"Expected a comparison in `output` {output} for `report_only`, got none. Leave it out to begin it."
        )
    inputs = _read(recipe, options, given.seeds)
    origin = inputs.origin  # a damaged teacher.checkpoint is refused here
    if begun(output):
        check_start(output, inputs.parts, origin)
    _check_mixing(inputs, methods)
    model = inputs.model
    planned = plan_students(model.make_student, model.boosting, inputs.x, widths="no_resched" in methods)
    if shared := equal_macs_note(planned):
        print(shared)
    fixed = ["--config", str(output / RECIPE), *options]
    training = Training(output, fixed, methods, given.seeds, given.workers, inputs, planned)
    if report_only:
        _report(training, _finished(training), recipe, text, options)
        return
    with in_use(output):
        check_same(output, text, options)  # another start may have begun meanwhile
        freeze(output, text, options, origin)
        rows = _report(training, _train_interruptibly(training), recipe, text, options)
        _track(inputs.tracking, output, summary_table(rows, model.boosting.task))


def _report(
    training: Training, cells: Sequence[Cell], recipe: Path, text: str, options: Sequence[str]
) -> list[dict[str, Any]]:
    """Writes and prints the report of the finished trainings; returns the rows of compare.csv."""
    output = training.output
    facts = {
        "recipe": recipe.stem,
        "options": shlex.join(options) or "none",
        "seeds": training.seeds,
        "commit": ", ".join(_revisions(output, cells)) or "none",
        "system": f"{platform.system()} {platform.machine()}",
    }
    return _publish(output, cells, training.inputs, training.planned, text, facts)


def _check_mixing(inputs: Inputs, methods: Sequence[Method]) -> None:
    alone = [method for method in methods if method in ("resched", "joint")]
    if inputs.mixes and alone:
        raise UserError(
            f"Expected `methods` that correct an error, into which LossMixing of the recipe mixes labels, got "
            f"{', '.join(alone)}. Leave them out."
        )


def _publish(
    output: Path, cells: Sequence[Cell], inputs: Inputs, planned: PlannedStudents, text: str, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Writes the report of finished trainings and prints its tables; returns the rows of compare.csv."""
    make, task = inputs.model.make_student, inputs.model.boosting.task
    times = latencies(make, {rungs_of(output, cell, planned.rungs): None for cell in cells}, inputs.x)
    rows = gather(output, cells, planned.rungs, times)
    page = write_comparison(output, rows, task, text, facts)
    print(format_table(*summary_table(rows, task)))
    first, *others = methods_of(rows)
    if others:
        differences = format_table(*difference_table(rows, first, task))
        print(f"\n{first} against the others{Unit.of(task).of_differences}:\n{differences}")
    print(f"\n{page}")
    return rows


def _revisions(output: Path, cells: Sequence[Cell]) -> list[str]:
    """Commits of the code at which cells were started, in order; a + marks uncommitted changes."""
    starts = chain.from_iterable(RunDirectory(cell.folder(output)).read("environment") or [] for cell in cells)
    return list(dict.fromkeys(start["revision"] for start in starts if start["revision"]))


def _read(recipe: Path, options: Sequence[str], seeds: int) -> Inputs:
    """Reads a recipe; checks that the data do not depend on the seed, as all seeds share one teacher."""
    command = ["--config", str(recipe), *options, "--trainer.logger=false"]
    first, *others = (run_fit([*command, f"--seed_everything={seed}"], PlanCLI).inputs for seed in range(min(seeds, 2)))
    for other in others:
        check_split(first.origin, other.parts)
    return first


class Training(NamedTuple):
    """Methods, seeds and options of the trainings of a comparison."""

    output: Path
    options: list[str]
    methods: Sequence[Method]
    seeds: int
    workers: int
    inputs: Inputs
    planned: PlannedStudents

    def chains(self, methods: Sequence[Method], planned: Sequence[PlannedStudents]) -> list[list[Cell]]:
        """The cells of these methods, one chain per seed; `planned` are given per seed."""
        settings = self.inputs.model.boosting
        return [
            [c for method in methods for c in cells_of(method, seed, settings, own)] for seed, own in enumerate(planned)
        ]


def _finished(training: Training) -> list[Cell]:
    """The cells that have been trained, in the order of seeds and methods.

    A prefix of `no_resched` counts once it is trained with all its losses, as the best of them is reported.

    Raises:
        UserError: there are none but the teacher's.
    """
    chains = training.chains(training.methods, [training.planned] * training.seeds)
    cells = [TEACHER, *chain.from_iterable(chains)]
    lacking = {(c.method, c.seed, c.prefix) for c in cells if not is_done(c.folder(training.output))}
    done = [cell for cell in cells if (cell.method, cell.seed, cell.prefix) not in lacking]
    if not any(cell is not TEACHER for cell in done):
        raise UserError(
            f"Expected finished trainings of {', '.join(training.methods)} in `output` {training.output} for "
            "`report_only`, got none. Leave it out to train them."
        )
    print(f"{len(done)} of {len(cells)} trainings are finished.")
    return done


def _train_interruptibly(training: Training) -> list[Cell]:
    """Trains all cells; an interruption prints how to resume."""
    message = (
        f"The comparison in {training.output} was interrupted. Give the same command again: it goes on from there."
    )
    with StopSignals(lambda: message).ending_with_message():
        return _train(training)


def _train(training: Training) -> list[Cell]:
    """Runs the unfinished cells of a comparison; returns all cells."""
    output, methods, workers, options = training.output, training.methods, training.workers, list(training.options)
    planned = [training.planned] * training.seeds
    cells = [TEACHER, *chain.from_iterable(training.chains(methods, planned))]
    print(f"{len(cells)} trainings: {', '.join(methods)}; {training.seeds} seeds, in {output}.", flush=True)
    CellRunner(output, options, 1, cells).run([[TEACHER]])
    if training.inputs.trains_teacher:
        weights = TEACHER.folder(output) / "teacher.safetensors"
        if not weights.exists():
            raise UserError(
                f"Expected {weights}, the weights of the teacher of this comparison, got no such file. Put it back, or "
                "choose another `output`."
            )
        options += ["--model.teacher.checkpoint", str(weights)]
    if {"bdistil", "no_resched"} <= set(methods):
        first = training.chains(["bdistil"], planned)
        CellRunner(output, options, workers, cells).run(first)
        planned = [_reached(training, cell) for (cell,) in first]
    chains = training.chains(methods, planned)
    cells = [TEACHER, *chain.from_iterable(chains)]
    CellRunner(output, options, workers, cells).run(chains)
    return cells


def _reached(training: Training, cell: Cell) -> PlannedStudents:
    """The students, with the widths for a finished run of bdistil, whose rejected rounds have used wider classes."""
    reached = [row["macs"] for row in RunDirectory(cell.folder(training.output)).read("figures")]
    return with_widths(training.planned, training.inputs.model.make_student, training.inputs.x, reached)


def _track(tracking: Any, output: Path, summary: TextTable) -> None:
    """Logs the table and the pictures of the comparison as a W&B run in the group of its trainings."""
    import wandb

    name = output.resolve().name
    settings = replace(tracking, group=name, name="summary", job_type="compare-summary")
    logger = make_logger(settings, output, {"comparison": name})
    if logger is None:
        return
    header, cells = summary
    try:
        images = {path.stem: wandb.Image(str(path)) for path in sorted(output.glob("compare-*.png"))}
        logger.experiment.log({**images, "methods": wandb.Table(columns=[*header], data=cells)})
        logger.experiment.finish()
    except Exception as error:
        rank_zero_warn(
            f"The comparison was not logged to W&B ({type(error).__name__}: {error}). Its report is complete."
        )
        wandb.teardown()  # otherwise W&B fails again at exit
