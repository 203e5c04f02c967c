"""Measure what this machine can do: matrix products, attention, memory, kernel launches, collectives.

Compute is timed in CPU time of one thread (GPU: in events), so that a busy machine does not blur it; messages by the
wall. On a CPU the model's own layers of several shapes are timed, too, on as many cores as ranks will use, and the
rates fitted to them: small kernels by themselves run out of the caches, layers in turn do not. The cost of a message is
fitted to layers that ranks share. The result is an entry of a hardware file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import gcd
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from numpy.typing import NDArray

from megatron_omega.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_omega.model.context import ModelContext
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.stream import Stream
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel
from megatron_omega.planner.hardware import AcceleratorFacts, Efficiency, Hardware, HardwareFile, Link, read_hardware
from megatron_omega.planner.stages import layer_seconds
from megatron_omega.planner.work import FORWARD_TRAFFIC, Work, layer_works

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = [
    (512, 512, 512),
    (512, 2048, 512),
    (512, 512, 2048),
    (512, 96, 512),
    (512, 512, 96),
    (64, 512, 512),
    (512, 64, 64),
]
LARGE_MESSAGE = 2**22
LAYERS = [(24, 48, 2, 16), (96, 768, 8, 128), (256, 1024, 8, 128), (192, 1536, 8, 256), (512, 8192, 16, 64)]
"""Hidden size, FFN size, heads and tokens of the layers that are timed."""
SHARED_LAYERS = [(96, 768, 8, 128), (192, 1536, 8, 256)]
"""Of those that ranks share: their heads divide among them."""
LAYERS_IN_TURN = 3
LAYER_ROUNDS = 4


def calibrate(name: str, device: str, *, ranks: int, per_node: int | None = None) -> HardwareFile:
    """Measure this machine and return a hardware file with the one accelerator `name`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {dtype: product_rates(device, DTYPES[dtype]) for dtype in _formats(device)}
        reference = next(iter(rates))
        peak, half = _fit(rates[reference])
        attention = attention_rate(device, DTYPES[reference])
        bandwidth, launch = bandwidth_of(device), launch_cost(device)
    finally:
        torch.set_num_threads(threads)
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
        watts=15.0 if is_cpu else 700.0,
        launch_seconds=launch,
        is_cpu=is_cpu,
        cores=cores,
        efficiency=efficiency,
    )
    if cores is not None:
        hardware = Hardware(name, facts, link, link, "measured")
        seconds = np.array(_on_every_core(_time_layers, min(ranks, cores))).mean(axis=0)
        facts = fit_rates(hardware, _layer_works(), seconds)
        sharing = max(2, gcd(ranks, SHARED_LAYERS[0][2]))
        seconds = np.array(_in_group(_time_shared_layers, sharing)).max(axis=0)
        latency = fit_latency(replace(hardware, facts=facts), _shared_works(sharing), seconds, sharing)
        link = link.model_copy(update={"latency": latency})
    return HardwareFile(efficiency=facts.efficiency, accelerators={name: facts}, links={"measured": link})


def layer_config(shape: tuple[int, int, int, int], **parallel: Any) -> RunConfig:
    """Return an Omega whose layers have this shape, with these settings of `parallel`."""
    hidden, inner, heads, tokens = shape
    model = ModelConfig(
        hidden_size=hidden, ffn_hidden_size=inner, num_attention_heads=heads, encoder_layers=1, decoder_layers=1,
        vocab_size=128, local_window=tokens // 4, axial_width=8,
    )  # fmt: skip
    data = DataConfig(encoder_seq_length=tokens, decoder_seq_length=tokens)
    precision = PrecisionConfig(dtype="fp32")
    return RunConfig(model=model, data=data, parallel=ParallelConfig(**parallel), precision=precision)


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


def timed_layers(config: RunConfig, parallel: TensorParallel) -> Iterator[list[Callable[[], torch.Tensor]]]:
    """Yield encoder, then decoder layers of one shape, ready to be called."""
    context = ModelContext.of(config, parallel)
    tokens, hidden = config.data.encoder_seq_length, config.model.hidden_size
    mine = tokens // parallel.size if parallel.sequence_parallel else tokens
    state, memory = (torch.randn(1, length, hidden, requires_grad=True) for length in (mine, tokens))
    stream = Stream(torch.ones(1, tokens, dtype=torch.long), context.kernels)
    model = config.model
    for kind, branches, rest in (
        (EncoderLayer, model.layer_branches("encoder", 0), ()),
        (DecoderLayer, model.layer_branches("decoder", 0), (memory, stream)),
    ):
        layers = [kind(f"timed.{number}", context, branches) for number in range(LAYERS_IN_TURN)]
        yield [partial(layer, state, stream, *rest) for layer in layers]


def forward_and_backward(layer: Callable[[], torch.Tensor]) -> tuple[float, float]:
    begin = time.process_time()
    output = layer()
    middle = time.process_time()
    output.backward(torch.ones_like(output))
    return middle - begin, time.process_time() - middle


def _formats(device: str) -> list[str]:
    return ["fp32", "bf16"] if device == "cpu" else ["bf16", "fp16", "fp32"]


def _seconds(function: Callable[[], Any], device: str, *, at_least: float = 0.05) -> float:
    """Return the best time of one call: repeated until `at_least` seconds went by, three times over."""
    function()
    repeats, best = 1, float("inf")
    for _ in range(3):
        while True:
            begin = _clock(device)
            for _ in range(repeats):
                function()
            passed = _clock(device) - begin
            if passed >= at_least:
                break
            repeats = max(repeats + 1, int(repeats * 1.5 * at_least / max(passed, at_least / 20)))
        best = min(best, passed / repeats)
    return best


def _clock(device: str) -> float:
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def product_rates(device: str, dtype: torch.dtype) -> dict[tuple[int, int, int], float]:
    scale = 1 if device == "cpu" else 8
    rates = {}
    for m, n, k in PRODUCTS if dtype == torch.float32 or device != "cpu" else PRODUCTS[:1]:
        m, n, k = m * scale, n * scale, k * scale
        left, right = (torch.rand(*shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
        seconds = _seconds(lambda left=left, right=right: F.linear(left, right), device)
        rates[m, n, k] = 2 * m * n * k / seconds
    return rates


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


def attention_rate(device: str, dtype: torch.dtype, length: int = 256, heads: int = 8, head_dim: int = 20) -> float:
    query, key, value = (torch.rand(1, heads, length, head_dim, device=device).to(dtype) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    seconds = _seconds(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask), device)
    return 4 * heads * length * length * head_dim / seconds


def bandwidth_of(device: str) -> float:
    """Bytes per second of a chain of element-wise kernels like a layer's, forward: a norm, a gate, a residual sum.

    Counted as the planner counts them: `FORWARD_TRAFFIC` times the bytes that autograd keeps.
    """
    tokens, width, inner = (512, 256, 1024) if device == "cpu" else (8192, 2048, 8192)
    hidden = torch.rand(tokens, width, device=device)
    gate_up = torch.rand(tokens, 2 * inner, device=device)
    weight = torch.ones(width, device=device)

    def chain() -> torch.Tensor:
        normal = F.rms_norm(hidden, (width,), weight)
        gate, up = gate_up.chunk(2, dim=-1)
        product = F.silu(gate) * up
        return hidden + 0.5 * normal + product[:, :width]

    kept = 4 * (2 * tokens * width + 4 * tokens * inner)
    return FORWARD_TRAFFIC * kept / _seconds(chain, device)


def launch_cost(device: str, length: int = 50) -> float:
    """Seconds of one small kernel in a chain run forward and backward, autograd's work included."""
    tiny = torch.ones(16, device=device, requires_grad=True)

    def chain() -> None:
        value = tiny
        for _ in range(length):
            value = value * 1.5 + tiny
        value.sum().backward()

    return _seconds(chain, device) / (4 * length)


def memory_of(device: str) -> float:
    if device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _known_link() -> Link:
    """Collectives between GPUs need several: take the built-in figure of the card's link."""
    file, name = read_hardware(), torch.cuda.get_device_name().lower()
    for accelerator, facts in file.accelerators.items():
        if accelerator.partition("-")[0] in name:
            return file.links[facts.link]
    return file.links["infiniband-hdr"]


def _link_rate(ranks: int) -> float:
    """Bytes per second of a large all-reduce between processes of this machine."""
    [seconds, *_] = _in_group(_time_message, ranks)
    return 2 * (ranks - 1) / ranks * LARGE_MESSAGE / seconds[0]


def _time_message(rank: int, group: dist.ProcessGroup, barrier: Any, results: dict[int, list[float]]) -> None:
    tensor = torch.zeros(LARGE_MESSAGE // 4)
    results[rank] = [float(np.median([_wall(partial(dist.all_reduce, tensor)) for _ in range(20)][1:]))]


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
    """Call `function(rank, group, barrier, results)` in ranks of a gloo group; return what each put into `results`."""
    return _on_every_core(partial(_join_group, function, ranks, _free_port()), ranks)


def _join_group(
    function: Callable[..., None], ranks: int, port: int, rank: int, barrier: Any, results: dict[int, list[float]]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        function(rank, dist.group.WORLD, barrier, results)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
