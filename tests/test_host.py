"""What a process asks of its machine. Each in a process of its own: it holds for all of one and cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.repository import ROOT

FAULTS = """
import resource, torch
from cdm.system import host

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        activations = [torch.ones(2, 2**20) for _ in range(8)]  # 64 MiB, 16384 pages
        del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
host.prepare(threads=3)
assert torch.get_num_threads() == 3, torch.get_num_threads()
torch.set_num_threads(1)
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_used_again() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16384  # without it, nearly all pages of all twenty rounds
