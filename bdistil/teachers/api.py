"""A teacher that is only an API: asked once about every input, counted, held to a budget, remembered on the disk."""

from __future__ import annotations

import hashlib
import math
import os
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
from bdistil.teachers.http_endpoint import ApiRefusedError, ApiUnavailableError, Pace

Answers = Literal["logits", "probabilities", "labels"]
LONGEST_WAIT = 60.0  # seconds between two attempts
SMALLEST_PROBABILITY = 1e-7  # where an API rounds one to 0; about the resolution of float32 near 1


class ApiTeacher(nn.Module):
    """Anything that maps inputs to answers, as a teacher: (x -> logits), in place of a module.

    What was asked once is never asked again, in this start or a later one. Inputs go out as float32, as they are. A
    request that fails on the way is sent again, after a wait that doubles; one whose contents are wrong is not.

    Limits: requests go out one after the other; `rate` holds for one process; a request that timed out, or was under
    way when the process was killed, counts, for the API may have answered it.

    Args:
        ask: maps a batch, float32 (B, ...) in NumPy, to B answers; such as an `HttpEndpoint`. It may raise
            ConnectionError or TimeoutError to be asked again.
        outputs: L.
        cache: file of the answers and of the count.
        answers: `logits` (B, L); `probabilities` (B, L), of which the centred logarithm is taken; `labels` (B,), the
            top-1 class, given as a one-hot of norm sqrt(L).
        name: what the cache and a run know the API by: change it when the model behind it changes. Its address, or the
            name of the function, by default.
        budget: largest number of queries (samples) ever sent; None is no limit.
        batch_size: samples a request.
        rate: samples a second.
        retries: further attempts of a request that failed.
        backoff: seconds before the first of them.

    Raises:
        UserError: an argument is out of its range; the cache is of another API.
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
                "Expected of an ApiTeacher `outputs` >= 2, `batch_size` >= 1, `retries` >= 0, `backoff` >= 0, `budget` "
                f">= 1 and `rate` > 0 where given, got {outputs}, {batch_size}, {retries}, {backoff}, {budget}, {rate}."
            )
        self.ask, self.outputs, self.answers, self.budget = ask, outputs, answers, budget
        self.batch_size, self.retries, self.backoff, self._pace = batch_size, retries, backoff, Pace(rate)
        known = name or getattr(ask, "name", None) or getattr(ask, "__qualname__", type(ask).__qualname__)
        self.identity = f"{known}, {answers} of {outputs} classes"
        self.cache = AnswerCache(Path(cache), self.identity)

    @property
    def hard(self) -> bool:
        """Does it answer with the top-1 class alone?"""
        return self.answers == "labels"

    @property
    def queries(self) -> int:
        """Samples sent so far, in all starts."""
        return self.cache.queries

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L) float32 of inputs (B, ...), on their device.

        Raises:
            RunError: the API does not answer, answers something else, or the budget does not allow the question.
            UserError: x is no tensor, or holds NaN or infinity.
        """
        batch = _as_batch(x)
        keys = [_key(sample) for sample in batch]
        known = self.cache.find(keys)
        if len(known) < len(set(keys)):
            with self.cache.alone():
                self._ask_missing(batch, keys)
            known = self.cache.find(keys)
        rows = torch.from_numpy(np.stack([known[key] for key in keys]) if keys else np.empty((0, self._columns)))
        return as_logits(rows.float(), self.answers, self.outputs).to(x.device)

    @property
    def _columns(self) -> int:
        return 1 if self.hard else self.outputs

    def _ask_missing(self, batch: np.ndarray, keys: Sequence[bytes]) -> None:
        """Asks what is not known, each input once, request by request."""
        known = self.cache.find(keys)
        missing = list({key: row for row, key in enumerate(keys) if key not in known}.items())
        self._check_budget(len(missing))
        for low in range(0, len(missing), self.batch_size):
            some = missing[low : low + self.batch_size]
            self._ask([key for key, _ in some], batch[[row for _, row in some]])

    def _check_budget(self, wanted: int) -> None:
        sent = self.queries
        if self.budget is not None and sent + wanted > self.budget:
            raise RunError(
                f"The query budget of the API is spent: {wanted} more would make {sent + wanted}, allowed are "
                f"{self.budget}. Nothing of them was sent, every answer so far is kept in {self.cache.path}. Raise "
                "`budget` and give the same command again, or ask for less."
            )

    def _ask(self, keys: Sequence[bytes], batch: np.ndarray) -> None:
        """One request, until it is answered or the attempts are used up; each attempt is in the budget."""
        wait, reason = self.backoff, ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._check_budget(len(batch))
            self._pace.wait(len(batch))
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

    def _attempt(self, keys: Sequence[bytes], batch: np.ndarray) -> ApiUnavailableError | None:
        """Sends a request once and keeps what comes; or says why nothing came."""
        number = self.cache.sending(len(batch))
        try:
            answers = self.ask(batch)
        except (ApiUnavailableError, ApiRefusedError) as error:
            if error.answered_nothing:
                self.cache.refused(number)
            if isinstance(error, ApiRefusedError):
                raise
            return error
        except (ConnectionError, TimeoutError) as error:
            return ApiUnavailableError(type(error).__name__, answered_nothing=False)
        rows, fault = read_answers(answers, len(batch), self.answers, self.outputs)
        good = np.isfinite(rows).all(1)
        self.cache.answered(number, {key: row for key, row, fine in zip(keys, rows, good, strict=False) if fine})
        if fault:
            raise RunError(
                f"{fault} Nothing wrong was kept; every other answer is in {self.cache.path}. Mend the API, or the "
                "settings of ApiTeacher, and give the same command again."
            )
        return None


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
    """What an API answered, as rows of numbers, and what is wrong with it.

    Args:
        answers: as they came.
        count: B, samples that were sent.
        kind: what they should be.
        outputs: L.

    Returns:
        Rows (B, L), or (B, 1) of labels, NaN in those that cannot be used; and a sentence about the fault, or "". The
        values themselves are in no sentence.
    """
    columns = 1 if kind == "labels" else outputs
    rows: np.ndarray
    try:
        rows = np.asarray(answers.cpu() if isinstance(answers, Tensor) else answers, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        rows = np.empty(())
    shape = (count, outputs) if columns > 1 else (count,)
    if kind == "labels" and rows.ndim == 2 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.shape != shape:
        got = f"shape {rows.shape}" if rows.ndim else "no array of numbers"
        return np.empty((0, columns)), f"Expected {kind} of shape {shape} of the API, got {got}."
    rows = rows.reshape(count, columns).copy()
    rows[~_valid(rows, kind, outputs)] = np.nan
    bad = int((~np.isfinite(rows).all(1)).sum())
    allowed = {
        "logits": "finite logits",
        "probabilities": "probabilities >= 0 that sum to 1",
        "labels": f"labels that are whole numbers in 0 … {outputs - 1}",
    }[kind]
    return rows, f"Expected {allowed} of the API, but {bad} of {count} answers are none." if bad else ""


def _valid(rows: np.ndarray, kind: Answers, outputs: int) -> np.ndarray:
    """Which rows are what they should be."""
    with np.errstate(invalid="ignore"):
        if kind == "probabilities":
            return np.asarray((rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) < 0.02))
        if kind == "labels":
            return np.asarray(((rows >= 0) & (rows < outputs) & (rows == np.floor(rows))).all(1))
        return np.asarray(np.isfinite(rows).all(1))


def as_logits(rows: Tensor, kind: Answers, outputs: int) -> Tensor:
    """Answers of an API as logits (B, L).

    Args:
        rows: (B, L), or (B, 1) of labels.
        kind: `logits` stay as they are; of `probabilities` the centred logarithm is taken; `labels` become one-hots of
            norm sqrt(L), the length that a standard normal vector has.
        outputs: L.
    """
    if kind == "labels":
        return F.one_hot(rows[:, 0].long(), outputs).to(rows.dtype) * math.sqrt(outputs)
    if kind == "probabilities":
        return centre(rows.clamp_min(SMALLEST_PROBABILITY).log())
    return rows
