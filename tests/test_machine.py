"""Habits of the machine are changed for a training, and put back where that is promised."""

import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from deepatlas.machine import denormals_are_zero


def tiny() -> float:
    """Half of a denormal number: not 0 unless they are flushed."""
    return float(torch.full((64,), 1e-40).mul(0.5)[0])


def test_denormals_come_back_also_after_an_error():
    assert tiny() > 0
    with denormals_are_zero():
        assert tiny() == 0
    assert tiny() > 0
    with suppress(RuntimeError), denormals_are_zero():
        raise RuntimeError
    assert tiny() > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_freed_memory_stays_with_the_process():
    program = (
        "import torch; from pathlib import Path; from deepatlas.machine import keep_freed_memory\n"
        "pages = lambda: int(Path('/proc/self/statm').read_text().split()[1])\n"
        "assert keep_freed_memory(); before = pages()\n"
        "block = torch.ones(1 << 24); del block\n"
        "assert pages() - before > 15_000, 'the 64 MiB were given back'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
