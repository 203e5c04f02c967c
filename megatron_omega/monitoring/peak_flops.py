"""Peak FLOP/s of the devices at hand, the denominator of MFU: known for common GPUs, measured on a CPU."""

from __future__ import annotations

import os
import time

import torch

from megatron_omega.parallel.products import product
from megatron_omega.planner.hardware import read_hardware
from megatron_omega.planner.machine import name_in


def peak_flops(world_size: int, dtype: str, given: float | None) -> float | None:
    """Return the peak FLOP/s of `world_size` devices together; `given` is that of one. None: an unknown GPU.

    Ranks on CPUs share one machine's cores: its peak is that of one thread, measured, times the cores they can use.
    """
    if given is not None:
        return given * world_size
    if not torch.cuda.is_available():
        return _measured_thread_peak() * min(world_size, os.cpu_count() or 1)
    file = read_hardware()
    name = name_in(file, torch.cuda.get_device_name())
    if name is None:
        return None
    facts = file.accelerators[name]
    return facts.peak_flops.get(dtype, facts.peak_flops["fp32"]) * world_size


def _measured_thread_peak(size: int = 512, repeats: int = 8) -> float:
    """FLOP/s of an fp32 matrix product in CPU time of one thread, so that a busy machine does not blur it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left = torch.rand(size, size)
        product(left, left)
        begin = time.thread_time()
        for _ in range(repeats):
            product(left, left)
        return 2 * size**3 * repeats / max(time.thread_time() - begin, 1e-9)
    finally:
        torch.set_num_threads(threads)
