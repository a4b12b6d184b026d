"""Memory that a process keeps is not zeroed by the kernel again."""

import os
import sys

import pytest

from tests import forked

SCRIPT = """
import resource, sys, torch
from model.cpu_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(1 << 24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20)  # until the heap has found its size
print(faults(5))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again_without_page_faults():
    def num_faults(way: str) -> int:
        return int(forked.run([sys.executable, "-c", SCRIPT, way], os.environ, check=True).stdout)

    assert num_faults("keep") * 20 < num_faults("return")
