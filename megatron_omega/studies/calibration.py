"""Measure what this machine can do: the model's kernels, what the host asks for to start them, collectives.

Rates of kernels are `kernel_rates`'s. On a CPU the model's own layers of several shapes are timed, too, on as many
cores as ranks will use, and the rates fitted to them: small kernels by themselves run out of the caches, layers in turn
do not. The cost of a message is fitted to layers that ranks share. The result is an entry of a hardware file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import product
from math import gcd
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray

from megatron_omega.config.schema import RunConfig
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel
from megatron_omega.parallel.topology import own_group
from megatron_omega.planner.hardware import AcceleratorFacts, Efficiency, Hardware, HardwareFile, Link, read_hardware
from megatron_omega.planner.machine import name_in
from megatron_omega.planner.stages import layer_seconds
from megatron_omega.planner.work import Work, layer_works
from megatron_omega.studies.kernel_rates import (
    DTYPES,
    attention_rate,
    bandwidth_of,
    formats,
    forward_and_backward,
    host_seconds,
    layer_config,
    memory_of,
    product_rates,
    timed_layers,
)

LARGE_MESSAGE = 2**22
LAYERS = [(24, 48, 2, 16), (96, 768, 8, 128), (256, 1024, 8, 128), (192, 1536, 8, 256), (512, 8192, 16, 64)]
"""Hidden size, FFN size, heads and tokens of the layers that are timed."""
SHARED_LAYERS = [(96, 768, 8, 128), (192, 1536, 8, 256)]
"""Of those that ranks share: their heads divide among them."""
LAYER_ROUNDS = 4


def calibrate(
    name: str, device: str, *, ranks: int, per_node: int | None = None, tell: Callable[[str], None] = lambda _: None
) -> HardwareFile:
    """Measure this machine and return a hardware file with the one accelerator `name`; `tell` hears what for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tell("products")
        rates = {dtype: product_rates(device, DTYPES[dtype]) for dtype in formats(device)}
        reference = next(iter(rates))
        peak, half = _fit(rates[reference])
        tell("attention, memory, launches")
        attention = attention_rate(device, DTYPES[reference])
        bandwidth, launch = bandwidth_of(device, DTYPES[reference]), host_seconds(device)
    finally:
        torch.set_num_threads(threads)
    tell("messages")
    link = Link(bytes_per_second=_link_rate(ranks), latency=0.0) if device == "cpu" else _known_link()
    # Peak is what the largest product reaches; the shares of the other kernels are of that.
    peaks = {dtype: max(rate.values()) for dtype, rate in rates.items()}
    peaks[reference] = peak
    efficiency = Efficiency(
        product=1.0, product_half=half, attention=attention / peak, memory=1.0, link=1.0, network=0.75, spread=0.2
    )
    is_cpu = device == "cpu"
    cores = len(os.sched_getaffinity(0)) if is_cpu else None
    facts = AcceleratorFacts(
        memory_gib=memory_of(device) / (cores or 1),
        peak_flops=peaks,
        memory_bandwidth=bandwidth,
        link="measured",
        network="measured",
        per_node=per_node or (max(64, ranks) if is_cpu else torch.cuda.device_count()),
        driver_names=() if is_cpu else tuple(torch.cuda.get_device_name().split()),
        watts=15.0 if is_cpu else 700.0,
        launch_seconds=launch,
        is_cpu=is_cpu,
        cores=cores,
        efficiency=efficiency,
    )
    if cores is not None:
        tell("whole layers, on every core and shared by ranks")
        hardware = Hardware(name, facts, link, link, "measured")
        seconds = np.array(_on_every_core(_time_layers, min(ranks, cores))).mean(axis=0)
        facts = fit_rates(hardware, _layer_works(), seconds)
        sharing = max(2, gcd(ranks, SHARED_LAYERS[0][2]))
        seconds = np.array(_in_group(_time_shared_layers, sharing)).max(axis=0)
        latency = fit_latency(replace(hardware, facts=facts), _shared_works(sharing), seconds, sharing)
        link = link.model_copy(update={"latency": latency})
    return HardwareFile(efficiency=facts.efficiency, accelerators={name: facts}, links={"measured": link})


def _layer_works() -> list[Work]:
    """Return what the timed layers ask for, in the order of `_time_layers`."""
    return [
        work[kind]
        for shape in LAYERS
        for recompute in ("none", "full")
        for work in [layer_works(layer_config(shape, recompute=recompute))]
        for kind in ("encoder", "decoder")
    ]


def fit_rates(hardware: Hardware, works: Sequence[Work], measured: NDArray[np.float64]) -> AcceleratorFacts:
    """Return the facts with the rates that describe timed layers best, in relative error.

    `measured` are seconds of forward and backward pass of each of `works`. The share of the measured peak, the half
    length and the bandwidth are searched on a grid; the cost of a launch follows from each by least squares.
    """

    def planned(facts: AcceleratorFacts) -> NDArray[np.float64]:
        machine = replace(hardware, facts=facts)
        times = [layer_seconds(work, machine, "fp32", 4, 1) for work in works]
        return np.array([part for seconds in times for part in (seconds.forward, seconds.backward)])

    best = (float("inf"), hardware.facts)
    for scale, half, bandwidth in product(
        np.linspace(0.5, 1.3, 17), (0, 8, 16, 32, 48, 64, 96, 128), np.geomspace(3, 60, 16)
    ):
        facts = _scaled(hardware.facts, float(scale), float(half), float(bandwidth) * 1e9)
        free, micro = (planned(facts.model_copy(update={"launch_seconds": cost})) for cost in (1e-12, 1e-6))
        launches = (micro - free) / measured
        cost = max(0.1, float((launches * (1 - free / measured)).sum() / (launches**2).sum()))
        error = float((np.log((free + cost * (micro - free)) / measured) ** 2).mean())
        if error < best[0]:
            best = error, facts.model_copy(update={"launch_seconds": cost * 1e-6})
    return best[1]


def _scaled(facts: AcceleratorFacts, scale: float, half: float, bandwidth: float) -> AcceleratorFacts:
    """Return facts with other peaks, half length and bandwidth; attention stays as fast as it was."""
    peaks = {dtype: peak * scale for dtype, peak in facts.peak_flops.items()}
    efficiency = {"product_half": half, "attention": facts.efficiency.attention / scale}
    changes = {"peak_flops": peaks, "memory_bandwidth": bandwidth}
    return facts.model_copy(update=changes | {"efficiency": facts.efficiency.model_copy(update=efficiency)})


def _on_every_core(function: Callable[..., None], processes: int) -> list[list[float]]:
    """Call `function(rank, barrier, results)` in several processes at once; return what each put into `results`."""
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        results, barrier = manager.dict(), manager.Barrier(processes)
        mp.spawn(function, (barrier, results), nprocs=processes)  # pyright: ignore[reportPrivateImportUsage]
        return list(results.values())


def _time_layers(rank: int, barrier: Any, results: dict[int, list[float]]) -> None:
    """Time forward and backward passes of encoder and decoder layers, all processes at the same shape at a time."""
    torch.set_num_threads(1)
    found: list[float] = []
    for shape, recompute in product(LAYERS, ("none", "full")):
        for layers in timed_layers(layer_config(shape, recompute=recompute), SERIAL):
            for layer in layers:  # the first pass allocates
                forward_and_backward(layer)
            barrier.wait()
            times = [forward_and_backward(layer) for _ in range(LAYER_ROUNDS) for layer in layers]
            found += np.median(times, axis=0).tolist()
    results[rank] = found


def _fit(rates: dict[tuple[int, int, int], float]) -> tuple[float, float]:
    """Return the peak and the half length that describe the measured rates best, in relative error."""
    shapes, measured = list(rates), np.array(list(rates.values()))
    best = (float("inf"), max(rates.values()), 0.0)
    for half in np.linspace(0, 200, 201):
        share = np.array([np.prod([side / (side + half) for side in shape]) for shape in shapes])
        peak = float(np.exp(np.mean(np.log(measured / share))))
        error = float(np.abs(np.log(peak * share / measured)).max())
        best = min(best, (error, peak, float(half)))
    return best[1], best[2]


def _known_link() -> Link:
    """Collectives between GPUs need several: take the built-in figure of the card's link."""
    file = read_hardware()
    name = name_in(file, torch.cuda.get_device_name())
    return file.links[file.accelerators[name].link if name else "infiniband-hdr"]


def _link_rate(ranks: int) -> float:
    """Bytes per second of a large all-reduce between processes of this machine."""
    [seconds, *_] = _in_group(_time_message, ranks)
    return 2 * (ranks - 1) / ranks * LARGE_MESSAGE / seconds[0]


def _time_message(rank: int, group: dist.ProcessGroup, barrier: Any, results: dict[int, list[float]]) -> None:
    tensor = torch.zeros(LARGE_MESSAGE // 4)
    results[rank] = [float(np.median([_wall(partial(dist.all_reduce, tensor, group=group)) for _ in range(20)][1:]))]


def fit_latency(hardware: Hardware, works: Sequence[Work], measured: NDArray[np.float64], ranks: int) -> float:
    """Return the seconds of a hop that describe timed tensor-parallel layers best, in relative error.

    `measured` are seconds of a forward with its backward pass of each of `works`. Messages by themselves are too fast:
    the ranks of a model never arrive at quite the same time.
    """

    def planned(latency: float) -> NDArray[np.float64]:
        machine = replace(hardware, link=hardware.link.model_copy(update={"latency": latency}))
        times = [layer_seconds(work, machine, "fp32", 4, ranks) for work in works]
        return np.array([seconds.forward + seconds.backward for seconds in times])

    hops = (planned(1e-3) - planned(0.0)) / measured
    return max(0.0, 1e-3 * float((hops * (1 - planned(0.0) / measured)).sum() / (hops**2).sum()))


def _shared_works(ranks: int) -> list[Work]:
    """Return what the timed layers that ranks share ask for, in the order of `_time_shared_layers`."""
    return [layer_works(config)[kind] for config in _shared_configs(ranks) for kind in ("encoder", "decoder")]


def _time_shared_layers(rank: int, group: dist.ProcessGroup, barrier: Any, results: dict[int, list[float]]) -> None:
    """Time forward with backward passes of tensor-parallel layers, by the wall."""
    found: list[float] = []
    for config in _shared_configs(group.size()):
        parallel = TensorParallel(group, rank, group.size(), config.parallel.sequence_parallel)
        for layers in timed_layers(config, parallel):
            for layer in layers:  # the first pass allocates
                forward_and_backward(layer)
            barrier.wait()
            times = [_wall(partial(forward_and_backward, layer)) for _ in range(LAYER_ROUNDS) for layer in layers]
            found.append(float(np.median(times)))
    results[rank] = found


def _shared_configs(ranks: int) -> list[RunConfig]:
    return [
        layer_config(shape, tensor_parallel_size=ranks, sequence_parallel=is_sequence_parallel)
        for shape in SHARED_LAYERS
        for is_sequence_parallel in (False, True)
    ]


def _wall(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _in_group(function: Callable[..., None], ranks: int) -> list[list[float]]:
    """Call `function(rank, group, barrier, results)` in ranks of a group; return what each put into `results`."""
    return _on_every_core(partial(_join_group, function, ranks, _free_port()), ranks)


def _join_group(
    function: Callable[..., None], ranks: int, port: int, rank: int, barrier: Any, results: dict[int, list[float]]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        group = cast(dist.ProcessGroup, own_group([range(ranks)], timedelta(minutes=5)))
        function(rank, group, barrier, results)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
