"""A teacher behind an API: each input is sent once; answers and the query count are stored on the disk."""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdistil.errors import RunError, UserError
from bdistil.functional.distillation import centre
from bdistil.teachers.api_cache import AnswerCache
from bdistil.teachers.http_endpoint import ApiRefusedError, ApiUnavailableError, as_api_error
from bdistil.utils.paths import user_path

Answers = Literal["logits", "probabilities", "labels"]
LONGEST_WAIT = 60.0  # seconds between two attempts
SMALLEST_PROBABILITY = 1e-7  # replaces 0 from a model that rounds or counts; about the resolution of float32 near 1


class ApiTeacher(nn.Module):
    """A function or an HTTP endpoint as a teacher (x -> logits), in place of a module.

    An input is sent only once in all starts, as float32, unchanged. A request that fails in transit is retried with
    exponential backoff; one with an invalid answer is not.

    Limits: requests are sequential; `rate` applies per process; a request that timed out, or was unanswered when the
    process was killed, counts as a query, as the API may have answered it.

    Args:
        ask: maps a batch, float32 (B, ...) in NumPy, to B answers, for example an `HttpEndpoint`. If it raises a
            connection error (of sockets, `requests`, `urllib`), one with a temporary HTTP status, or an
            `ApiUnavailableError`, the batch is sent again.
        outputs: L.
        cache: file that stores the answers and the query count.
        answers: `logits` (B, L); `probabilities` (B, L), converted to centred logarithms; `labels` (B,), the top-1
            classes, converted to one-hots of norm sqrt(L).
        name: identifies the API in the cache and in a run; change it if the model behind the API changes. By default
            the address of an endpoint or the name of a module-level function; other callables need one.
        budget: maximum number of queries (samples) in all starts; None for no limit.
        batch_size: samples per request.
        rate: maximum number of samples per second.
        retries: maximum number of retries of a failed request.
        backoff: seconds before the first retry.

    Raises:
        UserError: an argument is out of its range; `ask` has no name of its own; the cache belongs to another API.

    Example:
        >>> from tempfile import mkdtemp
        >>> cache = f"{mkdtemp()}/answers.sqlite"
        >>> api = ApiTeacher(lambda batch: batch @ np.eye(3), outputs=3, cache=cache, name="identity", budget=10)
        >>> api(torch.eye(3)).argmax(-1), api(torch.eye(3)).shape, api.queries
        (tensor([0, 1, 2]), torch.Size([3, 3]), 3)
    """

    trained = True  # a recipe has nothing to train here

    def __init__(
        self,
        ask: Callable[[np.ndarray], Any],
        outputs: int,
        cache: str | os.PathLike[str],
        answers: Answers = "logits",
        name: str | None = None,
        budget: int | None = None,
        batch_size: int = 64,
        rate: float | None = None,
        retries: int = 5,
        backoff: float = 0.5,
    ) -> None:
        super().__init__()
        if answers not in ("logits", "probabilities", "labels"):
            raise UserError(f"Expected `answers` to be 'logits', 'probabilities' or 'labels', got {answers!r}.")
        bad = outputs < 2 or batch_size < 1 or retries < 0 or backoff < 0
        if bad or (budget is not None and budget < 1) or (rate is not None and rate <= 0):
            raise UserError(
                "Expected `outputs` >= 2, `batch_size` >= 1, `retries` >= 0, `backoff` >= 0, `budget` >= 1 and `rate` "
                f"> 0 of an ApiTeacher, got {outputs}, {batch_size}, {retries}, {backoff}, {budget}, {rate}."
            )
        self.ask, self.outputs, self.answers, self.budget = ask, outputs, answers, budget
        self.batch_size, self.rate, self.retries, self.backoff = batch_size, rate, retries, backoff
        self._next_time = 0.0  # of the next request, by `rate`
        self.identity = f"{name or _own_name(ask)}, {answers} of {outputs} classes"
        self.cache = AnswerCache(user_path(cache, "cache"), self.identity)

    @property
    def hard(self) -> bool:
        """Whether the API returns the top-1 class only."""
        return self.answers == "labels"

    @property
    def queries(self) -> int:
        """Samples sent so far, in all starts."""
        return self.cache.queries

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) float32 of inputs (B, ...), on their device.

        Raises:
            RunError: the API does not answer or its answers are invalid; the budget is spent.
            UserError: x is not a tensor, or contains NaN or infinity.
        """
        batch = _as_batch(x)
        keys = [_key(sample) for sample in batch]
        recorded = self.cache.find(keys)
        if len(recorded) < len(set(keys)):
            with self.cache.alone():
                self._send_missing(batch, keys)
            recorded = self.cache.find(keys)
        columns = 1 if self.hard else self.outputs
        rows = torch.from_numpy(np.stack([recorded[key] for key in keys]) if keys else np.empty((0, columns)))
        return as_logits(rows.float(), self.answers, self.outputs).to(x.device)

    def _send_missing(self, batch: np.ndarray, keys: Sequence[bytes]) -> None:
        """Sends the inputs without a recorded answer, each once, request by request."""
        recorded = self.cache.find(keys)
        missing = {key: row for row, key in enumerate(keys) if key not in recorded}
        self._check_budget(len(missing))
        new, rows = list(missing), list(missing.values())
        for low in range(0, len(new), self.batch_size):
            self._send(new[low : low + self.batch_size], batch[rows[low : low + self.batch_size]])

    def _check_budget(self, wanted: int, failure: str = "") -> None:
        """Raises RunError if `wanted` queries exceed the budget; `failure` is why they are sent again."""
        sent = self.queries
        before = f"They were sent before, without an answer: {failure}" if failure else "None of them was sent"
        if self.budget is not None and sent + wanted > self.budget:
            raise RunError(
                f"The query budget of the API is spent: {wanted} more would make {sent + wanted}, allowed are "
                f"{self.budget}. {before}; every answer so far is kept in {self.cache.path}. Raise "
                "`budget` and give the same command again, or use fewer samples."
            )

    def _send(self, keys: Sequence[bytes], batch: np.ndarray) -> None:
        """Retries a request until it is answered or the attempts are used up; each attempt counts in the budget."""
        wait, reason = self.backoff, ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._check_budget(len(batch), reason)
            self._wait(len(batch))
            failure = self._attempt(keys, batch)
            if failure is None:
                return
            reason = failure.reason
            if attempt < self.retries:
                time.sleep(min(max(wait, failure.wait), LONGEST_WAIT))
                wait *= 2
        raise RunError(
            f"The API gave no answer in {self.retries + 1} attempts; last: {reason}. Every answer so far is kept in "
            f"{self.cache.path}. Give the same command again later: it goes on from there."
        )

    def _wait(self, samples: int) -> None:
        if self.rate is not None:
            now = time.monotonic()
            time.sleep(max(0.0, self._next_time - now))
            self._next_time = max(now, self._next_time) + samples / self.rate

    def _attempt(self, keys: Sequence[bytes], batch: np.ndarray) -> ApiUnavailableError | None:
        """Sends a request once and records the answers; returns the error if none came."""
        number = self.cache.sending(len(batch))
        failure = None
        try:
            # Answers are recorded, so they must not depend on the precision in which the caller trains.
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                answers = self.ask(batch)
        except Exception as error:
            failure = as_api_error(error)
            if failure is None:
                raise
        if failure is not None:  # outside `except`, so that no chained error shows the address
            if failure.answered_nothing:
                self.cache.refused(number)
            if isinstance(failure, ApiRefusedError):
                raise failure
            return failure
        rows, fault = read_answers(answers, len(batch), self.answers, self.outputs)
        good = np.isfinite(rows).all(1)
        self.cache.answered(number, {key: row for key, row, fine in zip(keys, rows, good, strict=False) if fine})
        if fault:
            raise RunError(
                f"{fault} Nothing invalid was kept; every other answer is in {self.cache.path}. Fix the API, or the "
                "settings of ApiTeacher, and give the same command again."
            )
        return None


def _own_name(ask: Any) -> str:
    """The name of an endpoint or module-level function, which distinguishes its answers from those of another API."""
    own = getattr(ask, "name", None) or getattr(ask, "__qualname__", None)
    local = "<" in str(own) or inspect.ismethod(ask)  # a lambda, a nested function, a bound method
    if isinstance(own, str) and not local:
        return own if hasattr(ask, "name") else f"{_module_of(ask)}.{own}"
    raise UserError(
        f"Expected `name` for an ApiTeacher that asks {own or f'an object of {type(ask).__qualname__}'}: the recorded "
        "answers are found by it, and those of another API could be taken for these. Change it with the model."
    )


def _module_of(ask: Any) -> str:
    """The module of a function; the name of its file if that is the script."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return Path(script).stem if ask.__module__ == "__main__" and script else str(ask.__module__)


def _as_batch(x: Any) -> np.ndarray:
    if not isinstance(x, Tensor):
        raise UserError(f"Expected inputs of an ApiTeacher to be one tensor (B, ...), got {type(x).__name__}.")
    batch = np.ascontiguousarray(x.detach().float().cpu().numpy())
    if not np.isfinite(batch).all():
        raise UserError("Expected inputs of an ApiTeacher to be finite, got NaN or infinity; nothing was sent.")
    return batch


def _key(sample: np.ndarray) -> bytes:
    """Hash of one input: its shape and its values."""
    return hashlib.sha256(repr(sample.shape).encode() + sample.tobytes()).digest()


def read_answers(answers: Any, count: int, kind: Answers, outputs: int) -> tuple[np.ndarray, str]:
    """Validates the raw answers of an API to B = `count` samples.

    Returns:
        Rows (B, L), or (B, 1) for labels, with NaN in invalid ones, and in all if a label is L or more; and an error
        sentence without any of the values, or "".
    """
    columns = 1 if kind == "labels" else outputs
    shape = (count,) if kind == "labels" else (count, outputs)
    rows: np.ndarray
    try:
        rows = np.array(answers.cpu().float().numpy() if isinstance(answers, Tensor) else answers, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        rows = np.empty(())
    if rows.shape not in (shape, (count, columns)):
        got = f"shape {rows.shape}" if rows.ndim else "no array of numbers"
        return np.empty((0, columns)), f"Expected {kind} of shape {shape} of the API, got {got}."
    rows = rows.reshape(count, columns)
    with np.errstate(invalid="ignore"):
        allowed, valid = {
            "logits": ("finite logits", np.isfinite(rows)),
            "probabilities": (
                "probabilities >= 0 that sum to 1",
                (rows >= 0) & (np.abs(rows.sum(1, keepdims=True) - 1) < 0.02),
            ),
            "labels": (
                f"labels that are whole numbers in 0 … {outputs - 1}",
                (rows >= 0) & (rows < outputs) & (rows == np.floor(rows)),
            ),
        }[kind]
    wrong = ~valid.all(1)
    beyond = kind == "labels" and bool((rows >= outputs).any())  # classes numbered differently: none can be trusted
    rows[wrong] = np.nan
    bad, hint = int(wrong.sum()), ""
    if beyond:
        rows[:] = np.nan
        hint = (
            " None of this request was kept, as the classes may be numbered differently, such as from 1. If they are, "
            "answers recorded before are wrong as well: give another `cache` with the mended function."
        )
    return rows, f"Expected {allowed} of the API, but {bad} of {count} answers are invalid.{hint}" if bad else ""


def as_logits(rows: Tensor, kind: Answers, outputs: int) -> Tensor:
    """Converts the answers of an API, rows (B, L) or labels (B, 1), to logits (B, L).

    `logits` are unchanged; `probabilities` become centred logarithms; `labels` become one-hots of norm sqrt(L), that of
    a standard normal vector of L numbers.
    """
    if kind == "labels":
        return F.one_hot(rows[:, 0].long(), outputs).to(rows.dtype) * math.sqrt(outputs)
    if kind == "probabilities":
        return centre(rows.clamp_min(SMALLEST_PROBABILITY).log())
    return rows
