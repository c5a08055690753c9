"""Freed memory stays with the process: counted by the pages that the system hands out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ALLOCATOR = Path(__file__).parents[2] / "bdistil" / "utils" / "memory.py"
# 20 blocks of 8 MiB, each freed before the next, and the pages of 4 KiB that they took
PROGRAM = f"""
import ctypes, json, resource, runpy
keep = runpy.run_path({str(ALLOCATOR)!r})["keep_freed_memory"]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallopt(-1, 128 << 10), libc.mallopt(-3, 128 << 10)  # as a process starts, and no moving threshold
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(8 << 20)
        ctypes.memset(block, 1, 8 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([pages(), keep(), pages()]))
"""


def run(variables):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=variables)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_blocks_that_are_freed_and_asked_for_again_cost_pages_once():
    before, kept, after = run({})
    assert kept
    assert before > 20 * 2000
    assert after < 2 * 2100


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
def test_what_the_user_has_set_stays():
    before, kept, after = run({"MALLOC_ARENA_MAX": "2"})
    assert not kept
    assert after > before / 2
