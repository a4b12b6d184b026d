"""Freed memory is used again, and the kernel does not zero its pages each time."""

import os
import sys

import pytest

from tests.helpers import forked

SCRIPT = """
import resource, torch
from model.training.cpu_memory import keep_freed_memory
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(1 << 24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
by_default = faults(5)
assert keep_freed_memory()
faults(20)  # until the heap has found its size
print(faults(5), by_default)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no mallopt")
def test_freed_memory_is_used_again_without_page_faults():
    kept, by_default = forked.run([sys.executable, "-c", SCRIPT], os.environ, check=True).stdout.split()
    assert int(kept) * 20 < int(by_default)
