"""`bdistil compare`: trains the students of a recipe by several methods and reports the differences."""

from __future__ import annotations

import difflib
import json
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from bdistil.boosting.checks.data import TEST
from bdistil.boosting.costs import is_api
from bdistil.callbacks import LossMixing
from bdistil.cli.commands import find_recipe
from bdistil.cli.distiller import Distiller
from bdistil.cli.fit import BoostCLI, run_fit
from bdistil.cli.parser import Parser
from bdistil.comparison.forms import Forms, latencies, plan_forms, shared_forms, with_widths
from bdistil.comparison.methods import MEANING, METHODS, TEACHER, Cell, Method, cells_of, check_methods
from bdistil.comparison.origin import FILE, Origin, check_split, check_start, origin_of, parts_of, read_origin
from bdistil.comparison.report import Unit, difference_table, summary_table, write_comparison
from bdistil.comparison.running import CellRunner, is_done
from bdistil.comparison.tables import classes_of, gather, methods_of
from bdistil.data.loaders import LOADERS
from bdistil.errors import UserError
from bdistil.reporting.tables import TextTable, format_table
from bdistil.reporting.tracking import Tracking, make_logger
from bdistil.storage.files import write_atomically
from bdistil.storage.run_directory import RunDirectory
from bdistil.teachers.wrappers import comes_trained
from bdistil.utils.paths import user_path
from bdistil.utils.signals import StopSignals

EXAMPLE = "bdistil compare --config digits --methods bdistil no_resched joint --seeds 3 --output compare-digits"
METHODS_HELP = ". ".join(f"{method}: {meaning}" for method, meaning in MEANING.items())
OWN = ("config", "output", "methods", "seeds", "workers", "report_only", "help")
FILES = ("recipe.yaml", "options.json", "compare.csv", "compare.md", "report.html")  # in the folder of a comparison
# Options that the comparison sets for each training, and the option of `compare` that determines them.
SET = {"run_dir": "output", "seed_everything": "seeds"}


def compare(
    config: str,
    output: str,
    methods: list[Method] = list(METHODS),  # noqa: B006
    seeds: int = 5,
    workers: int = 1,
    report_only: bool = False,
) -> None:
    """Compare bdistil with other ways to train the same students, on the same data and teacher.

    All other options are those of `bdistil fit`, and hold for every training. The same command resumes an interrupted
    comparison; more methods and seeds may be added.

    Args:
        config: recipe, a YAML file or a name that `bdistil recipes` lists.
        output: folder of the runs, compare.csv, compare.md, the pictures and report.html.
        methods: bdistil and the methods to compare it with.
        seeds: number of seeds, from 0.
        workers: number of parallel processes; torch's threads are divided among them.
        report_only: train nothing; write the report of the trainings that are finished, also while others run.
    """


@dataclass(frozen=True)
class Inputs:
    """What a comparison takes from its recipe.

    Attributes:
        model: teacher, students and settings.
        parts: loaders by the name of the method that returned them.
        x: example batch (1, ...), on which MACs are counted as in a run.
        tracking: settings of the W&B run.
        mixes: whether the recipe has a LossMixing.
        origin: content of origin.json.
        trains_teacher: whether the first cell trains the teacher.
    """

    model: Distiller
    parts: Mapping[str, Any]
    x: Any
    tracking: Tracking
    mixes: bool
    origin: Origin
    trains_teacher: bool


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
            origin=origin_of(parts, model.teacher),
            trains_teacher=not (comes_trained(model.teacher.network) or model.teacher.checkpoint),
        )


class PartsCLI(BoostCLI):
    """Sets up the data of a recipe as in a training with another seed."""

    def fit(self, model: Distiller, datamodule: LightningDataModule) -> None:
        """Collects the loaders."""
        self.parts = parts_of(datamodule, model.boosting)


def run_compare(args: Sequence[str]) -> None:
    """Runs the command; options it does not know are passed to `bdistil fit`."""
    own, options = split_options(args)
    _check_options(own, options)
    summary = (compare.__doc__ or "").splitlines()[0]
    parser = Parser(
        prog="bdistil compare",
        description=summary,
        epilog=f"All other options are those of `bdistil fit`, and hold for every training. Methods: {METHODS_HELP}. "
        f"Example: {EXAMPLE}",
    )
    parser.add_function_arguments(compare, as_positional=False, as_group=False)
    given = parser.instantiate(parser.parse_args(own))
    if given.seeds < 1 or given.workers < 1:
        raise UserError(f"Expected `seeds` and `workers` >= 1, got {given.seeds} and {given.workers}.")
    _compare(find_recipe(given.config), user_path(given.output, "output"), check_methods(given.methods), given, options)


def split_options(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments into the options of `compare`, with the values of `methods` joined, and those of `fit`."""
    groups: list[list[str]] = []
    for arg in args:
        if arg.startswith("--") or arg == "-h" or not groups:
            groups.append(list(arg.split("=", 1)) if arg.startswith("--") and "=" in arg else [arg])
        else:
            groups[-1].append(arg)
    own: list[str] = []
    others: list[str] = []
    for name, *values in groups:
        key = "help" if name == "-h" else name.removeprefix("--")
        if key == "methods":
            own += [name, json.dumps([m for value in values for m in re.findall(r"\w+", value)])]
        elif key in OWN:
            own += [name, *values]
        else:
            others += [name, *values]
    return own, others


def _check_options(own: Sequence[str], options: Sequence[str]) -> None:
    """Raises UserError for options that would be overridden, and for misspelt options of `compare`."""
    if own.count("--config") > 1:
        raise UserError("Expected one `--config`, got several. Put them into one file; other options may follow.")
    for name in (option.removeprefix("--") for option in options if option.startswith("--")):
        if name in SET:
            raise UserError(f"`--{name}` is set by the comparison for each training: give `--{SET[name]}` instead.")
        if "." not in name and (near := difflib.get_close_matches(name, OWN, 1, 0.75)):
            raise UserError(f"Expected an option of compare or fit, got `--{name}`. Did you mean `--{near[0]}`?")


def _compare(recipe: Path, output: Path, methods: Sequence[Method], given: Any, options: Sequence[str]) -> None:
    text = recipe.read_text(encoding="utf-8")
    _check_same(output, text, options)
    if given.report_only and not _begun(output):
        raise UserError(
            f"Expected a comparison in `output` {output} for `report_only`, got none. Leave it out to begin it."
        )
    inputs = _read(recipe, options, given.seeds)
    if _begun(output):
        check_start(output, inputs.parts, inputs.origin)
    _check_mixing(inputs, methods)
    model = inputs.model
    forms = plan_forms(model.make_student, model.boosting, inputs.x, widths="no_resched" in methods)
    if shared := shared_forms(forms):
        print(shared)
    fixed = ["--config", str(_freeze(output, text, options, inputs.origin)), *options]
    training = Training(output, fixed, methods, given.seeds, given.workers, inputs, forms)
    cells = _finished(training) if given.report_only else _train_interruptibly(training)
    facts = {
        "recipe": recipe.stem,
        "options": shlex.join(options) or "none",
        "seeds": given.seeds,
        "commit": ", ".join(_revisions(output, cells)) or "none",
        "system": f"{platform.system()} {platform.machine()}",
    }
    rows = _publish(output, cells, inputs, forms, text, facts)
    if not given.report_only:
        _track(inputs.tracking, output, summary_table(rows, model.boosting.task))


def _check_mixing(inputs: Inputs, methods: Sequence[Method]) -> None:
    alone = [method for method in methods if method in ("resched", "joint")]
    if inputs.mixes and alone:
        raise UserError(
            f"Expected `methods` that correct an error, into which LossMixing of the recipe mixes labels, got "
            f"{', '.join(alone)}. Leave them out."
        )


def _publish(
    output: Path, cells: Sequence[Cell], inputs: Inputs, forms: Forms, text: str, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Writes the report of finished trainings and prints its tables; returns the rows of compare.csv."""
    make, task = inputs.model.make_student, inputs.model.boosting.task
    times = latencies(make, {classes_of(output, cell, forms.rungs): None for cell in cells}, inputs.x)
    rows = gather(output, cells, forms.rungs, times)
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
    inputs: Inputs = cast(PlanCLI, run_fit([*command, f"--seed_everything={TEACHER.seed}"], PlanCLI)).inputs
    if seeds > 1:
        other: Any = run_fit([*command, f"--seed_everything={TEACHER.seed + 1}"], PartsCLI)
        check_split(inputs.origin, other.parts)
    return inputs


class Training(NamedTuple):
    """Methods, seeds and options of the trainings of a comparison."""

    output: Path
    options: list[str]
    methods: Sequence[Method]
    seeds: int
    workers: int
    inputs: Inputs
    forms: Forms

    def chains(self, methods: Sequence[Method], forms: Sequence[Forms]) -> list[list[Cell]]:
        """The cells of these methods, one chain per seed; `forms` are given per seed."""
        settings = self.inputs.model.boosting
        return [
            [c for method in methods for c in cells_of(method, seed, settings, own)] for seed, own in enumerate(forms)
        ]


def _finished(training: Training) -> list[Cell]:
    """The cells that have been trained, in the order of seeds and methods.

    A prefix of `no_resched` counts once it is trained with all its losses, as the best of them is reported.

    Raises:
        UserError: there are none but the teacher's.
    """
    chains = training.chains(training.methods, [training.forms] * training.seeds)
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
    forms = [training.forms] * training.seeds
    cells = [TEACHER, *chain.from_iterable(training.chains(methods, forms))]
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
        first = training.chains(["bdistil"], forms)
        CellRunner(output, options, workers, cells).run(first)
        forms = [_reached(training, cell) for (cell,) in first]
    chains = training.chains(methods, forms)
    cells = [TEACHER, *chain.from_iterable(chains)]
    CellRunner(output, options, workers, cells).run(chains)
    return cells


def _reached(training: Training, cell: Cell) -> Forms:
    """Forms that match a finished run of bdistil, whose rejected rounds have used wider classes than planned."""
    reached = [row["macs"] for row in RunDirectory(cell.folder(training.output)).read("figures")]
    return with_widths(training.forms, training.inputs.model.make_student, training.inputs.x, reached)


def _check_same(output: Path, text: str, options: Sequence[str]) -> None:
    """Raises UserError if the folder holds a run, or a comparison of another recipe or with other options."""
    copy, kept = output / "recipe.yaml", output / "options.json"
    if (output / "rounds").exists():
        raise UserError(f"`output` {output} is the folder of a run, whose report would be lost. Choose another folder.")
    if not _begun(output):
        if read_origin(output) is None and (own := [name for name in FILES if (output / name).exists()]):
            raise UserError(f"`output` {output} has a file {own[0]}, which would be replaced. Choose another folder.")
        return
    if lost := [name for name in (copy.name, kept.name, FILE) if not (output / name).exists()]:
        raise UserError(
            f"`output` {output} holds a comparison without its {lost[0]}, so nothing shows whether recipe, options and "
            "data are still the same. Put the file back, or choose another folder."
        )
    if (copy.read_text(encoding="utf-8"), json.loads(kept.read_text())) != (text, list(options)):
        raise UserError(
            f"`output` {output} holds a comparison of another recipe or with other options "
            f"({' '.join(json.loads(kept.read_text())) or 'none'}). Choose another folder, or give those."
        )


def _begun(output: Path) -> bool:
    """Whether any training has passed its checks; before that, recipe and options may still be changed."""
    return any((output / "runs").glob("*/config.yaml"))


def _freeze(output: Path, text: str, options: Sequence[str], origin: Origin) -> Path:
    """Stores recipe, options and origin of a comparison; returns the copy of the recipe that its trainings read.

    Raises:
        UserError: the folder cannot be written to.
    """
    copy, kept = output / "recipe.yaml", output / "options.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not _begun(output):  # written first, as it identifies the other files as those of a comparison
            write_atomically(output / FILE, json.dumps(origin))
        write_atomically(kept, json.dumps(list(options)))
        write_atomically(copy, text)
    except OSError as error:
        raise UserError(f"`output` {output} cannot be written to: {error.strerror or error}.") from error
    return copy


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
