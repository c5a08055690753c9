"""Validation of `student` and of the modules that it builds, before they are trained."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils.data import IterableDataset

from bdistil.boosting.checks.batches import close
from bdistil.boosting.checks.data import check_repeatable
from bdistil.boosting.settings import BoostingSettings
from bdistil.data.loaders import check_dataset
from bdistil.ensemble.restore import restore_buffers
from bdistil.errors import UserError
from bdistil.metrics.cost import as_written, is_compiled
from bdistil.models.inputs import InputSpec, takes_parts
from bdistil.models.stages import FEATURES
from bdistil.models.student import Rung, Student, build_student, linked_activations, run_student
from bdistil.storage.blueprint import reason_indescribable
from bdistil.utils.modules import eval_mode, first_shared, module_device
from bdistil.utils.trees import leaves_of, row_count, take_rows


def check_factory(make: Any) -> None:
    """Raises UserError unless `student` is a function that takes the number of a round."""
    if isinstance(make, nn.Module) or not callable(make):
        raise UserError(
            f"Expected `student` to be a function of the round, make_student(round) -> module, got a "
            f"{type(make).__name__}. Each round trains a new student: write student=lambda round: …"
        )
    try:
        inspect.signature(make).bind(0)
    except TypeError as error:
        raise UserError(
            f"Expected `student` to be a function of the round, make_student(round) -> module, got one that cannot be "
            f"called with a number ({error}). Write student=lambda round: …"
        ) from error
    except ValueError:  # a callable whose signature is unavailable
        return


def check_widths(make: Callable[..., nn.Module], ladder: Sequence[Rung]) -> None:
    """Raises UserError if the ladder has wider rungs but `student` takes no `width`."""
    wider = [rung.width for rung in ladder if rung.width != 1]
    parameters = inspect.signature(make).parameters.values()
    if wider and not any(p.name == "width" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise UserError(
            f"The ladder has students of width x{wider[0]:g}, but `student` takes no `width`. "
            "Write make_student(round, width=1.0), or leave such rungs out."
        )


def check_rounds(student: nn.Module, rounds: int) -> None:
    """Raises UserError if there are more rounds than segments that the students read."""
    most = student.most_rounds if isinstance(student, Student) else None
    if most is not None and rounds > most:
        raise UserError(
            f"Expected `rounds` of the boosting settings to be at most {most}, as many as {type(student).__name__} has "
            f"segments to read, got {rounds}. Give it more `segments`, or fewer rounds."
        )


def check_student(student: nn.Module, earlier: Sequence[nn.Module], example: Any, outputs: int | None = None) -> None:
    """Checks a new student, and materialises its lazy layers.

    Args:
        student: the new, linked student; its mode is kept.
        earlier: the students before it, on the same device.
        example: x of a few samples.
        outputs: L of the teacher; None if not known yet.

    Raises:
        UserError: the student cannot be trained, saved or evaluated; the message gives the reason and the fix.
    """
    _refuse_compiled(student)
    _check_state(student)
    _check_types(student)
    if not isinstance(student, Student) and takes_parts(student, example):
        raise UserError(
            f"Expected a student with `forward(self, x)`, where x is the {type(example).__name__}, got "
            f"{type(student).__name__}, whose `forward` takes its parts. Make it the body of bdistil.Student(body, "
            "head), which is given them one by one."
        )
    with as_written(student, *earlier), torch.no_grad(), eval_mode(student):
        answer = _evaluate(student, earlier, example)
        _check_alone(student, earlier, example, answer)
        if isinstance(student, Student):
            _check_parts(student, earlier, example, answer)
    if outputs is not None:
        _check_outputs(student, answer, outputs)
    unknown = [name for name, value in _tensors(student) if isinstance(value, UninitializedParameter)]
    if unknown:
        raise UserError(
            f"Expected a student whose lazy layers are all used, but `{unknown[0]}` has no size after a first batch. "
            "Give the layer its sizes, or leave it out."
        )


def check_restored(student: nn.Module, make: Callable[..., nn.Module], x: Any) -> None:
    """Checks that the student of the first round can be restored by `make` and its weights, if not by its files alone.

    Args:
        student: a student that passed `check_student`.
        make: ``make_student(round)``.
        x: an example batch (B, ...).

    Raises:
        UserError: a second student with the weights of the first one answers differently, or cannot load them.
    """
    if reason_indescribable(student) is None:
        return
    second = build_student(make, 0, [], Rung(0), x)
    try:
        second.load_state_dict(student.state_dict(), strict=False)
    except RuntimeError as error:
        raise UserError(
            f"Expected `student` to make the same student again for a round, as when the run is loaded, got {error}."
        ) from error
    restore_buffers(second, dict(student.named_buffers()))
    with as_written(student, second), torch.no_grad(), eval_mode(student), eval_mode(second):
        first, again = run_student(student, [], x), run_student(second, [], x)
        if isinstance(first, Tensor) and not close(first, again):  # others are refused elsewhere
            raise UserError(
                "Expected a student whose answers depend on its weights and buffers alone, got one that answers "
                "differently when `student` makes it again and its state dict is loaded, as when the run is loaded. "
                "Register random tensors by `register_buffer`, and layers in a list as an nn.ModuleList."
            )


def check_reads(student: nn.Module, loader: Any, name: str) -> None:
    """Checks that a new, unlinked student can read a sample of the validation or test part.

    Args:
        student: a student that passed `check_student`.
        loader: loader of the part with batches (x, y); None if there is no such part.
        name: name of the user's method that returned it.

    Raises:
        UserError: the student fails on the sample.
    """
    if loader is None or isinstance(loader.dataset, IterableDataset):
        return
    check_dataset(loader, name)
    x, _ = loader.collate_fn([loader.dataset[0]])
    try:
        with as_written(student), torch.no_grad(), eval_mode(student):
            run_student(student, [], move_data_to_device(x, module_device(student)))
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"Expected x of `{name}()` in the form of the training part, got {_form(x)}, on which the student fails "
            f"({type(error).__name__}: {error})."
        ) from error


def _form(x: Any) -> str:
    tensors = InputSpec.of_batch(x).tensors()
    return ", ".join(f"{name} of shape {part.shape} and type {part.dtype}" for name, part in tensors.items())


def check_ladder(make: Callable[..., nn.Module], settings: BoostingSettings, x: Any, outputs: int) -> None:
    """Builds and checks a student of each class in every round; if classes read stages, also pairs of them in sequence.

    Args:
        make: ``make_student(round)``.
        settings: settings of the run.
        x: an example batch (B, ...).
        outputs: L of the teacher.

    Raises:
        UserError: a student cannot be built or evaluated; names its round and class.
    """
    earlier: list[nn.Module] = []
    rungs: list[Rung] = []
    with isolate_rng(include_cuda=False):
        for number in range(settings.rounds):
            links = not earlier or isinstance(earlier[0], Student)
            classes = settings.rungs(number, links=links)
            made = [_next_student(make, earlier, rungs, rung, x, outputs) for rung in classes]
            if number == 2 and any(rung.reads_stages for rung in classes):  # the same pairs as in later rounds
                _check_pairs(make, earlier[0], rungs[0], classes, x, outputs)
            earlier, rungs = [*earlier, made[0]], [*rungs, classes[0]]


def _check_pairs(
    make: Callable[..., nn.Module], first: nn.Module, rung: Rung, classes: Sequence[Rung], x: Any, outputs: int
) -> None:
    """Builds a student of each class after one of each class but the first: the round before may accept any of them."""
    for before in classes[1:]:
        second = _next_student(make, [first], [rung], before, x, outputs)
        for after in classes:
            _next_student(make, [first, second], [rung, before], after, x, outputs)


def _next_student(
    make: Callable[..., nn.Module], earlier: list[nn.Module], rungs: list[Rung], rung: Rung, x: Any, outputs: int
) -> nn.Module:
    """Builds and checks a student of a class after the `earlier` ones; returns it in eval mode."""
    number = len(earlier)
    try:
        student = build_student(make, number, earlier, rung, x).cpu()
        _check_own(student, earlier)
        check_student(student, earlier, x, outputs)
    except Exception as error:  # the user's code may raise anything
        reason = str(error) if isinstance(error, UserError) else f"It fails by {type(error).__name__}: {error}."
        place = f"round {number + 1}, of class {rung.name}" + (f" after one of class {rungs[-1].name}" if rungs else "")
        raise UserError(f"The student of {place}, cannot be used. {reason}{_way_out(rungs, rung)}") from error
    return student.train(False)


def _check_own(student: nn.Module, earlier: Sequence[nn.Module]) -> None:
    """Raises UserError if a student is an earlier one or trains parameters of one, which are frozen later on."""
    if any(student is other for other in earlier):
        raise UserError("Expected `student` to make a new module in each round, got the same one again.")
    if name := first_shared(student, nn.ModuleList(earlier)):
        raise UserError(
            f"Expected a student with weights of its own, got `{name}` that an earlier student holds, too: it would be "
            "frozen from the second round on. Make the layer inside `student`, as copy.deepcopy(layer), or freeze what "
            "all rounds share: layer.requires_grad_(False)."
        )


def _way_out(rungs: Sequence[Rung], rung: Rung) -> str:
    """Advice for the error message if two classes of the ladder are incompatible."""
    if rung.at and rungs and rung.width != rungs[-1].width:
        return " Give both classes the same `width`, or the student a `refinement` to its own channels."
    if rung.at and rungs and rungs[-1].links and rung != rungs[-1]:
        return " Any class may be accepted in any round: leave one of the two out of the ladder."
    return ""


def _check_outputs(student: nn.Module, answer: Any, outputs: int) -> None:
    """Raises UserError unless the logits, and the `outputs` of a `Student`, have the L of the teacher."""
    shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
    if not isinstance(answer, Tensor) or answer.ndim != 2 or answer.shape[1] != outputs:
        raise UserError(
            f"Expected logits (B, {outputs}) of a student, as the teacher gives L={outputs} outputs, got {shape}. Give "
            f"the student a head of {outputs} outputs."
        )
    if isinstance(student, Student) and student.outputs != outputs:
        raise UserError(
            f"Expected `outputs` of the student to be {outputs}, as many as its head gives, got {student.outputs}."
        )


def _check_parts(student: Student, earlier: Sequence[nn.Module], example: Any, answer: Any) -> None:
    """Raises UserError if an overridden `forward` differs from `answer` after `features`, which run in an ensemble."""
    x = move_data_to_device(example, module_device(student))
    linked = linked_activations(student, earlier, x)
    by_parts: Any = student.answer(student.activations(x, linked)[FEATURES], linked)
    if isinstance(answer, Tensor) and isinstance(by_parts, Tensor) and not close(answer, by_parts):
        raise UserError(
            f"Expected `forward` of {type(student).__name__} to be `answer` after `features`, which are called alone "
            "when it answers in an ensemble, but the logits differ. Put what `forward` adds into body or head, or "
            "override `features` or `answer`."
        )


def _evaluate(student: nn.Module, earlier: Sequence[nn.Module], example: Any) -> Any:
    x = move_data_to_device(example, module_device(student))
    try:
        return check_repeatable(lambda x: run_student(student, earlier, x), "the student", x)
    except RuntimeError as error:
        given = {x.data.dtype for x in leaves_of(example) if x.data.is_floating_point()}
        own = {p.dtype for p in student.parameters() if p.is_floating_point()}
        if given and own and given != own:
            raise UserError(
                f"Expected x of the same type as the student's weights ({_names(own)}), got {_names(given)}. Convert x "
                "in the dataset, or the student."
            ) from error
        if not given and "dtype" in str(error):
            raise UserError(
                f"Expected a student that reads x as it is, {_form(example)}, got one that fails on it ({error}). "
                "Integers are for embeddings; convert other x to float32 in the dataset (Arrays: --data.standardise "
                "true)."
            ) from error
        if re.search(r"mat1 and mat2|to have \d+ channels", str(error)):
            raise UserError(
                f"Expected a student that reads x as it is, {_form(example)}, got one that fails on it ({error}). Set "
                "the sizes of its input, such as `features` or `in_channels`."
            ) from error
        raise


def _check_alone(student: nn.Module, earlier: Sequence[nn.Module], example: Any, answer: Any) -> None:
    """Raises UserError if the logits of a sample alone, as at an early exit, differ from those in a larger batch."""
    x = move_data_to_device(example, module_device(student))
    try:
        first, samples = take_rows(x, slice(0, 1)), row_count(x)
    except UserError:  # the batch cannot be split into samples
        return
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != samples:  # rejected elsewhere
        return
    try:
        same = close(run_student(student, earlier, first), answer[:1])
        how = "answers it differently than among others"
    except (RuntimeError, ValueError) as error:
        same, how = False, f"fails on it ({error})"
    if not same:
        raise UserError(
            f"Expected a student that answers a sample by itself, whatever else is in the batch, got one that {how}. "
            "Early exits take samples out of the batch. Leave out what reads the whole batch: batch norm with "
            "track_running_stats=False, means over the samples, a fixed batch size."
        )


def _names(types: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))


def _tensors(student: nn.Module) -> list[tuple[str, Tensor]]:
    return [*student.named_parameters(), *student.named_buffers()]


def _refuse_compiled(student: nn.Module) -> None:
    """Raises UserError for TorchScript, and for a module that wraps another one, as `torch.compile(network)` does."""
    if isinstance(student, torch.jit.ScriptModule):
        raise UserError(
            f"Expected a student written in Python, got a {type(student).__name__} of TorchScript, which cannot be "
            "frozen once it is committed. Give the module that was scripted, or network.compile() if it should be "
            "faster."
        )
    for name, module in student.named_modules():
        if is_compiled(module):
            raise UserError(
                f"Expected a student that is compiled in place, got the result of torch.compile(network) as "
                f"{f'`{name}`' if name else 'the student'}. Write network.compile(), with the same options."
            )


def _check_state(student: nn.Module) -> None:
    """Raises UserError unless the state consists of unquantised tensors and some parameter is trainable."""
    for name, value in student.state_dict().items():
        if not isinstance(value, Tensor) or (not isinstance(value, UninitializedBuffer) and value.is_quantized):
            kind = "a quantized tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(
                f"Expected the state of a student to be tensors of numbers, got {kind} as `{name}`. Keep what "
                "`get_extra_state` returns in a buffer or an attribute; quantize students when they are exported "
                "(`bdistil export --quantise`)."
            )
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(
            f"Expected a student with parameters to train, got a {type(student).__name__} without one that requires a "
            "gradient."
        )


def _check_types(student: nn.Module) -> None:
    """Raises UserError for half-precision weights, which round small updates away, and float64 weights with links."""
    if isinstance(student, Student) and student.links and torch.float64 in {p.dtype for p in student.parameters()}:
        raise UserError(
            "Expected a student with weights in float32, as it links to earlier ones, got float64. Leave them in "
            "float32, or give a ladder without links: BoostingSettings(ladder=[Rung(0)])."
        )
    for name, parameter in student.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                f"Expected a student with weights in float32, got {_names({parameter.dtype})} (`{name}`). Leave them "
                "in float32 and give Trainer(precision='bf16-mixed') or '16-mixed'."
            )
