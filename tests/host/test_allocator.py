"""Memory that is freed is not asked of the kernel again: counted in page faults, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from megatron_omega.host.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    tensors = [torch.ones(size) for size in (1 << 20, 2 << 20, 3 << 20, 10 << 20)]  # 4, 8, 12, 40 MiB
    return sum(tensor[0].item() for tensor in tensors)

told = keep_freed_memory() if sys.argv[1] == "kept" else None
for _ in range(4):
    step()
before = faults()
for _ in range(5):
    step()
print(told, faults() - before)
"""


def run(mode: str, **environment: str) -> tuple[str, int]:
    """Return whether the allocator was told, and the page faults of five steps of 64 MiB."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, mode], env=known | environment, capture_output=True, text=True, check=True
    )
    told, faults = done.stdout.split()
    return told, int(faults)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="no glibc"
)
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise() -> None:
    pages = 5 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert run("left")[1] > 0.5 * pages  # what is counted can be seen
    assert run("kept") == ("True", pytest.approx(0, abs=0.02 * pages))
    told, faults = run("kept", MALLOC_MMAP_THRESHOLD_="131072")
    assert told == "False" and faults > 0.5 * pages
