"""Passes over rows of 16-bit numbers, compiled by Numba: one over the memory, where torch needs some twenty.

The rows are those of `row_files.row_type`, seen as (B, 2 + L) int16, whose first two are the float32 step of the row.
What is stored has the same bits as without Numba; sums agree within the rounding of float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]
# Rows that are added up in float32, before float64 takes their sum.
GROUP = 16
# Largest eta |S|, in powers of 2, that is taken: no sum of a group overflows.
LARGEST_EXPONENT = np.float32(60)

F32, I32 = np.float32, np.int32
STEPS, SMALLEST_STEP, ONE, ZERO = F32(32767), F32(1e-30), F32(1), F32(0)
LOW_HALF, ABSOLUTE, ONE_BITS = I32(0xFFFF), I32(0x7FFFFFFF), I32(127 << 23)
# Cephes, exp2f: 2^f for f in -1/2 … 1/2.
C1, C2, C3, C4, C5, C6 = (
    F32(c)
    for c in (6.931472028550421e-1, 2.402264791363012e-1, 5.550332471162809e-2,
              9.618437357674640e-3, 1.339887440266574e-3, 1.535336188319500e-4)
)  # fmt: skip
pread = ctypes.CDLL(None).pread
pread.argtypes, pread.restype = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64], ctypes.c_ssize_t
# As IEEE has it, and as is quickest but for NaN.
exact = njit(nogil=True, error_model="numpy")
loose = njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@njit(inline="always")
def powers_of_2(x: Any) -> tuple[Any, Any]:
    """2^x and 2^-x in float32, |x| < 126. Those of a library are not compiled to vectors."""
    whole = np.rint(x)
    f, shift = x - whole, I32(whole) << I32(23)
    even = ONE + f * f * (C2 + f * f * (C4 + f * f * C6))
    odd = f * (C1 + f * f * (C3 + f * f * C5))
    up, down = np.int32(ONE_BITS + shift).view(np.float32), np.int32(ONE_BITS - shift).view(np.float32)
    return (even + odd) * up, (even - odd) * down


@exact
def step_of(row: Array) -> Any:
    """The step of a row (2 + L,)."""
    return np.int32((I32(row[1]) << I32(16)) | (I32(row[0]) & LOW_HALF)).view(np.float32)


@exact
def decode(kept: Array, out: Array) -> None:
    """Writes rows (B, 2 + L) int16 as numbers, (B, L) float32."""
    for row in range(len(kept)):
        step = step_of(kept[row])
        for column in range(out.shape[1]):
            out[row, column] = F32(kept[row, 2 + column]) * step


@exact
def read(file: int, low: int, some: Array, out: Array) -> bool:
    """Reads rows of a file as numbers, some at a time: those that are read stay in the cache until they are decoded.

    Args:
        file: handle.
        low: the first row.
        some: memory for some rows, (b, 2 + L) int16.
        out: memory for all, (B, L) float32.

    Returns:
        False where the file ends early or cannot be read.
    """
    width = 2 * some.shape[1]
    for start in range(0, len(out), len(some)):
        rows = min(len(some), len(out) - start)
        if pread(file, some.ctypes, rows * width, (low + start) * width) != rows * width:
            return False
        decode(some[:rows], out[start : start + rows])
    return True


@exact
def take(file: int, index: Array, row: Array, out: Array) -> bool:
    """Reads scattered rows of a file as numbers.

    Args:
        file: handle.
        index: of the rows, shape (B,) int64.
        row: memory for one, (1, 2 + L) int16.
        out: memory for all, (B, L) float32.

    Returns:
        False where the file ends early or cannot be read.
    """
    width = 2 * row.shape[1]
    for place in range(len(index)):
        if pread(file, row.ctypes, width, index[place] * width) != width:
            return False
        decode(row, out[place : place + 1])
    return True


@exact
def encode(numbers: Array, bits: Array, out: Array) -> Any:
    """Writes numbers (L,) as a row (2 + L,), rounded as torch rounds; returns the largest, or NaN where one is.

    Args:
        numbers: float32.
        bits: the same memory as int32. Without their sign they are in the order of the numbers, and those of NaN last.
        out: the row.
    """
    most = I32(0)
    for column in range(len(bits)):
        most = I32(max(most, I32(bits[column] & ABSOLUTE)))
    largest = np.int32(most).view(np.float32)
    step = largest / STEPS
    kept = np.float32(step).view(np.int32)
    out[0], out[1] = np.int16(kept & LOW_HALF), np.int16(kept >> I32(16))
    times = ONE / max(step, SMALLEST_STEP)
    for column in range(len(numbers)):
        out[2 + column] = np.int16(I32(np.rint(numbers[column] * times)))
    return largest


@exact
def deviate(g: Array, s: Array, answers: Array, deviation: Array, new: Array) -> None:
    """Writes d = f - g and S + d of a row, both (L,)."""
    g_step, s_step = step_of(g), step_of(s)
    for column in range(len(new)):
        deviation[column] = answers[column] - F32(g[2 + column]) * g_step
        new[column] = F32(s[2 + column]) * s_step + deviation[column]


@loose
def squares(row: Array) -> Any:
    """Sum of the squares of a row (2 + L,): of whole numbers in float32, then float64."""
    total = ZERO
    for column in range(2, len(row)):
        total += F32(row[column]) * F32(row[column])
    return np.float64(total) * np.float64(step_of(row)) ** 2


@loose
def add_margins(s: Array, deviation: Array, scale: Any, sums: Array) -> None:
    """Adds (exp(-eta S) - exp(eta S)) d of a row to the sums (L,)."""
    step = step_of(s) * scale
    for column in range(len(sums)):
        up, down = powers_of_2(F32(s[2 + column]) * step)
        sums[column] += (down - up) * deviation[column]


@loose
def add_powers(s: Array, scale: Any, sums: Array) -> None:
    """Adds exp(eta S) + exp(-eta S) of a row to the sums (L,)."""
    step = step_of(s) * scale
    for column in range(len(sums)):
        up, down = powers_of_2(F32(s[2 + column]) * step)
        sums[column] += up + down


@exact
def moderate(largest: Any, scale: Any) -> bool:
    """Can powers of numbers up to this one be added up? Not of NaN, nor of what a torn file says."""
    return bool(abs(largest * scale) <= LARGEST_EXPONENT)


@exact
def flush(sums: Array, total: Array) -> None:
    """Adds the sums of a group, float32, to those of all rows, float64, and begins the next."""
    for column in range(len(sums)):
        total[column] += np.float64(sums[column])
        sums[column] = ZERO


@exact
def log_normaliser(s: Array, scale: Any, out: Array) -> bool:
    """log sum_i (exp(eta S_ij) + exp(-eta S_ij)) of rows (B, 2 + L), into (L,) float64.

    Args:
        s: rows of S.
        scale: eta log2(e).
        out: memory for the result.

    Returns:
        False where a number is too large, or is none: then the result is undefined.
    """
    sums = np.zeros(len(out), np.float32)
    out[:] = 0.0
    for row in range(len(s)):
        if not moderate(step_of(s[row]) * STEPS, scale):
            return False
        add_powers(s[row], scale, sums)
        if (row + 1) % GROUP == 0:
            flush(sums, out)
    flush(sums, out)
    out[:] = np.log(out)
    return True


@exact
def advance(
    g: Array, s: Array, answers: Array, scale: Any, weight: Array, first: bool, new: Array, margins: Array
) -> tuple[Any, ...]:
    """S of the next version of some rows, S + f - g, and what they add to the sums of all.

    Args:
        g: rows of the teacher, (B, 2 + L) int16.
        s: rows of S.
        answers: f, shape (B, L) float32.
        scale: eta log2(e).
        weight: 1 / Z of all rows of S, shape (L,) float64.
        first: the error before is g.
        new: memory for the new rows, (B, 2 + L) int16.
        margins: memory for the margins, shape (L,) float64.

    Returns:
        Whether that went well: False where a number of S before is too large, or is none (of S after `log_normaliser`
        says so). Sums of squares of the error before and after, and the largest |S| after.
    """
    outputs = answers.shape[1]
    deviation, numbers, sums = (
        np.empty(outputs, np.float32),
        np.empty(outputs, np.float32),
        np.zeros(outputs, np.float32),
    )
    bits = numbers.view(np.int32)
    before = after = 0.0
    most = ZERO
    margins[:] = 0.0
    for row in range(len(answers)):
        deviate(g[row], s[row], answers[row], deviation, numbers)
        largest = encode(numbers, bits, new[row])
        if not moderate(step_of(s[row]) * STEPS, scale):
            return False, before, after, most
        most = max(most, largest)
        before += squares(g[row] if first else s[row])
        after += squares(new[row])
        add_margins(s[row], deviation, scale, sums)
        if (row + 1) % GROUP == 0:
            flush(sums, margins)
    flush(sums, margins)
    margins *= weight
    return True, before, after, most


def trial() -> None:
    """Compiles all that is called from outside, on one row."""
    row, numbers, sums = np.zeros((1, 3), np.int16), np.zeros((1, 1), np.float32), np.ones(1)
    decode(row, numbers)
    read(-1, 0, row, numbers)
    take(-1, np.zeros(1, np.int64), row, numbers)
    advance(row, row, numbers, ONE, sums, True, row.copy(), sums)
    log_normaliser(row, ONE, sums)
