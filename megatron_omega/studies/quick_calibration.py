"""Measure one core of this machine in a few seconds, once: enough for the forecast of a small run.

Times what steps are made of, layers of small shapes, in CPU time of one thread, and fits rates to them; what ranks say
to each other is taken from the built-in list. `studies.calibration` measures that, too, and takes longer.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import torch

from megatron_omega.parallel.tensor_parallel import SERIAL
from megatron_omega.planner.hardware import AcceleratorFacts, Efficiency, Hardware, HardwareFile, read_hardware
from megatron_omega.planner.machine import CPU, cores, keep, this_machine
from megatron_omega.planner.work import Work, layer_works
from megatron_omega.studies.calibration import fit_rates
from megatron_omega.studies.kernel_rates import (
    attention_rate,
    forward_and_backward,
    layer_config,
    memory_of,
    product_rates,
    timed_layers,
)

SHAPES = ((24, 48, 2, 16), (96, 768, 8, 128), (192, 1536, 8, 256))
"""Hidden size, FFN size, heads and tokens of the layers that are timed."""
ROUNDS = 2
_MULTIPLY = """
import os, sys, numpy
a = numpy.ones((512, 512), numpy.float32)
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    a @ a
"""
BF16_SHARE = 0.05
"""Of the rate of fp32 products, where a CPU has no instructions for bf16."""
LINK = "shared-memory"
"""What ranks of one host talk through."""


def calibrate_once() -> float | None:
    """Measure this machine unless it has been; return the seconds that took, None if there was nothing to do."""
    machine = this_machine()
    if machine is not None and machine.is_calibrated:
        return None
    began = time.perf_counter()
    keep(measure())
    _give_back()
    return time.perf_counter() - began


def _give_back() -> None:
    """Let the allocator return what the layers took: the forecast counts what a process holds."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def measure() -> HardwareFile:
    """Return a hardware file with this machine as `cpu`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = max(product_rates(CPU, torch.float32).values())
        attention = attention_rate(CPU, torch.float32)
        works, seconds = _time()
        crowding = _crowding()
    finally:
        torch.set_num_threads(threads)
    builtin = read_hardware()
    link = builtin.links[LINK]
    efficiency = Efficiency(
        product=1.0, product_half=16, attention=attention / peak, memory=1.0, link=1.0, network=0.75, spread=0.3
    )
    facts = AcceleratorFacts(
        memory_gib=memory_of(CPU) / cores(), peak_flops={"fp32": peak, "bf16": BF16_SHARE * peak},
        memory_bandwidth=builtin.accelerators[CPU].memory_bandwidth, link=LINK, network=LINK, per_node=64,
        watts=15.0, launch_seconds=1e-5, is_cpu=True, cores=cores(), efficiency=efficiency,
    )  # fmt: skip
    facts = fit_rates(Hardware(CPU, facts, link, link, LINK), works, np.array(seconds))
    facts = facts.model_copy(update={"crowding": crowding})
    return HardwareFile(efficiency=facts.efficiency, accelerators={CPU: facts}, links={LINK: link})


def _crowding() -> float:
    """Return how much longer layers take while all other cores multiply matrices."""
    config = layer_config(SHAPES[1], recompute="none")
    layers = [layer for of_kind in timed_layers(config, SERIAL) for layer in of_kind]

    def seconds() -> float:
        return sum(min(sum(forward_and_backward(layer)) for _ in range(ROUNDS)) for layer in layers)

    seconds()  # the first pass allocates
    alone = seconds()
    with ExitStack() as others:
        for _ in range(cores() - 1):
            others.enter_context(_busy_core())
        return max(1.0, seconds() / alone)


@contextmanager
def _busy_core() -> Iterator[None]:
    """Let another process multiply matrices meanwhile; it ends with this one, whatever happens."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MULTIPLY, str(os.getpid())]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun, or could not
            yield
        finally:
            process.kill()


def _time() -> tuple[list[Work], list[float]]:
    """Return what the timed layers ask for, and the seconds of their forward and backward passes, in turn."""
    works: list[Work] = []
    seconds: list[float] = []
    for shape in SHAPES:
        config = layer_config(shape, recompute="none")
        asked = layer_works(config)
        for kind, layers in zip(("encoder", "decoder"), timed_layers(config, SERIAL), strict=True):
            for layer in layers:  # the first pass allocates
                forward_and_backward(layer)
            times = [forward_and_backward(layer) for _ in range(ROUNDS) for layer in layers]
            works.append(asked[kind])
            seconds += np.median(times, axis=0).tolist()
    return works, seconds
