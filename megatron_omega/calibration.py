"""Measure what this machine can do: matrix products, attention, memory, kernel launches, collectives.

Compute is timed in CPU time of one thread (GPU: in events), so that a busy machine does not blur it; collectives by
the wall, the best of several. The result is an entry of a hardware file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from megatron_omega.planner.hardware import AcceleratorFacts, Efficiency, HardwareFile, Link, read_hardware
from megatron_omega.planner.work import FORWARD_TRAFFIC

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
MESSAGES = [2**12, 2**16, 2**20, 2**22]


def calibrate(name: str, device: str, *, ranks: int, per_node: int | None = None) -> HardwareFile:
    """Measure this machine and return a hardware file with the one accelerator `name`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = {dtype: _product_rates(device, DTYPES[dtype]) for dtype in _formats(device)}
        reference = next(iter(rates))
        peak, half = _fit(rates[reference])
        attention = _attention_rate(device, DTYPES[reference])
        bandwidth, launch = _bandwidth(device), _launch_seconds(device)
    finally:
        torch.set_num_threads(threads)
    link = _collectives(ranks) if device == "cpu" else _known_link()
    # Peak is what the largest product reaches; the shares of the other kernels are of that.
    peaks = {dtype: max(rate.values()) for dtype, rate in rates.items()}
    peaks[reference] = peak
    efficiency = Efficiency(
        product=1.0, product_half=half, attention=attention / peak, memory=1.0, link=1.0, network=0.75, spread=0.2
    )
    is_cpu = device == "cpu"
    cores = len(os.sched_getaffinity(0)) if is_cpu else None
    facts = AcceleratorFacts(
        memory_gib=_memory_gib(device) / (cores or 1),
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
    return HardwareFile(efficiency=efficiency, accelerators={name: facts}, links={"measured": link})


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


def _product_rates(device: str, dtype: torch.dtype) -> dict[tuple[int, int, int], float]:
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


def _attention_rate(device: str, dtype: torch.dtype, length: int = 256, heads: int = 8, head_dim: int = 20) -> float:
    query, key, value = (torch.rand(1, heads, length, head_dim, device=device).to(dtype) for _ in range(3))
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    seconds = _seconds(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask), device)
    return 4 * heads * length * length * head_dim / seconds


def _bandwidth(device: str) -> float:
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


def _launch_seconds(device: str, length: int = 50) -> float:
    """Seconds of one small kernel in a chain run forward and backward, autograd's work included."""
    tiny = torch.ones(16, device=device, requires_grad=True)

    def chain() -> None:
        value = tiny
        for _ in range(length):
            value = value * 1.5 + tiny
        value.sum().backward()

    return _seconds(chain, device) / (4 * length)


def _memory_gib(device: str) -> float:
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


def _collectives(ranks: int) -> Link:
    """Time all-reduces between processes of this machine; fit rate and latency."""
    with mp.get_context("spawn").Manager() as manager:
        seconds = manager.dict()
        mp.spawn(_time_messages, (ranks, _free_port(), seconds), nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        measured = dict(seconds)
    small, large = min(measured), max(measured)
    hops = min(ranks - 1, 2 * (ranks - 1).bit_length())
    latency = measured[small] / (2 * hops)
    moved = 2 * (ranks - 1) / ranks * large
    return Link(bytes_per_second=moved / max(measured[large] - measured[small], 1e-9), latency=latency)


def _time_messages(rank: int, ranks: int, port: int, seconds: dict[int, float]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    for size in MESSAGES:
        tensor = torch.zeros(size // 4)
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            dist.all_reduce(tensor)
            times.append(time.perf_counter() - begin)
        if rank == 0:
            seconds[size] = min(times)
    dist.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
