"""Rates of the kernels that the model uses, and what a host asks for to start them: on a CPU and on a GPU alike.

Products, attention, norm, gate and sum are those that `model.kernels` chooses for the device, at the shapes of a narrow
model. A CPU is timed in CPU time of one thread, so that a busy machine does not blur it; a GPU by the wall, with a
synchronisation before the clock is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatron_omega.config.schema import DataConfig, ModelConfig, ParallelConfig, PrecisionConfig, RunConfig
from megatron_omega.model.attention import attend, branch_facts
from megatron_omega.model.compilation import compile_layers
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import select_kernels
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.stream import Pattern, Stream
from megatron_omega.parallel.lean import add_and_norm
from megatron_omega.parallel.products import product
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel
from megatron_omega.planner.hardware import BACKWARD_HOST
from megatron_omega.planner.work import BACKWARD_LAUNCHES, FORWARD_TRAFFIC, layer_works

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
LAYERS_IN_TURN = 3
NARROW = (96, 128, 4, 128)
"""Hidden size, FFN size, heads and tokens of a layer that a GPU computes faster than its host can ask for it."""
HOST_ROUNDS = 10

Call = Callable[[], Tensor]


def formats(device: str) -> list[str]:
    """Return the number formats that are timed on a kind of device, the one that the others are relative to first."""
    return ["fp32", "bf16"] if device == "cpu" else ["bf16", "fp16", "fp32"]


def clock(device: str) -> float:
    """Return seconds at which everything asked of the device is done."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(function: Callable[[], Any], device: str, *, at_least: float = 0.05) -> float:
    """Return the best time of one call: repeated until `at_least` seconds went by, three times over."""
    function()
    repeats, best = 1, float("inf")
    for _ in range(3):
        while True:
            begin = clock(device)
            for _ in range(repeats):
                function()
            passed = clock(device) - begin
            if passed >= at_least:
                break
            repeats = max(repeats + 1, int(repeats * 1.5 * at_least / max(passed, at_least / 20)))
        best = min(best, passed / repeats)
    return best


def product_rates(device: str, dtype: torch.dtype) -> dict[tuple[int, int, int], float]:
    """Return FLOP/s of products [m, k] x [k, n], by (m, n, k)."""
    scale = 1 if device == "cpu" else 8
    rates = {}
    for m, n, k in PRODUCTS if dtype == torch.float32 or device != "cpu" else PRODUCTS[:1]:
        m, n, k = m * scale, n * scale, k * scale
        left, right = (torch.rand(*shape, device=device).to(dtype) for shape in ((m, k), (n, k)))
        seconds = best_seconds(lambda left=left, right=right: product(left, right), device)
        rates[m, n, k] = 2 * m * n * k / seconds
    return rates


def attention_rate(device: str, dtype: torch.dtype, length: int = 256, heads: int = 8, head_dim: int = 20) -> float:
    """Return FLOP/s of the kernel that the model takes for one document of `length` tokens, all of which it sees.

    On a GPU tokens and heads are eight times as many, or it would wait for the host; and, as the planner counts, head
    sizes are those that its kernels take.
    """
    padded = head_dim
    if device != "cpu":
        length, heads, padded = 8 * length, 8 * heads, -(-head_dim // 8) * 8
    kernels = select_kernels(device)
    pattern = Pattern(causal=False, window=length, width=length)
    stream = Stream(torch.ones(1, length, dtype=torch.long, device=device), kernels)
    facts = branch_facts("full", pattern, stream, dtype)
    query, key, value = (torch.rand(1, heads, length, head_dim, device=device).to(dtype) for _ in range(3))
    seconds = best_seconds(lambda: attend("full", pattern, query, key, value, facts, kernels), device)
    return 4 * heads * length * length * padded / seconds


def bandwidth_of(device: str, dtype: torch.dtype) -> float:
    """Return bytes per second of what a layer does beside products: norm, sum with its norm, gate, as the model has it.

    Counted as the planner counts them: `FORWARD_TRAFFIC` times the bytes that autograd keeps.
    """
    tokens, width, inner = (512, 256, 1024) if device == "cpu" else (8192, 2048, 8192)
    kernels = select_kernels(device)
    hidden, update = torch.rand(2, tokens, width, device=device).to(dtype).unbind()
    gate_up = torch.rand(tokens, 2 * inner, device=device).to(dtype)
    weight = torch.ones(width, device=device, dtype=dtype)

    def chain() -> tuple[Tensor, ...]:
        normal = kernels.norm(hidden, weight, 1e-6)
        return *add_and_norm(normal, update, 0.5, weight, 1e-6), kernels.gated_activation(gate_up)

    kept = dtype.itemsize * (2 * tokens * width + 2 * tokens * inner)
    return FORWARD_TRAFFIC * kept / best_seconds(chain, device)


def host_seconds(device: str) -> float:
    """Return what the host asks for to start one kernel of a real layer, forward and backward: autograd included.

    The layers are so narrow that the device is done before the host is; so the host's time is all there is.
    """
    config = layer_config(NARROW, dtype=formats(device)[0], recompute="none")
    works = layer_works(config)
    backward = BACKWARD_HOST if device == "cpu" else BACKWARD_LAUNCHES  # as the planner counts it
    seconds, launches = 0.0, 0.0
    for kind, layers in zip(("encoder", "decoder"), timed_layers(config, SERIAL, device), strict=True):
        for layer in layers:
            forward_and_backward(layer, device)
        times = [sum(forward_and_backward(layer, device)) for _ in range(HOST_ROUNDS) for layer in layers]
        seconds += float(np.median(times))
        launches += works[kind].launches * (1 + backward)
    return seconds / launches


def layer_config(shape: tuple[int, int, int, int], *, dtype: str = "fp32", **parallel: Any) -> RunConfig:
    """Return an Omega whose layers have this hidden size, FFN size, heads and tokens; `parallel` are its settings."""
    hidden, inner, heads, tokens = shape
    model = ModelConfig(
        hidden_size=hidden, ffn_hidden_size=inner, num_attention_heads=heads, encoder_layers=1, decoder_layers=1,
        vocab_size=128, local_window=tokens // 4, axial_width=8,
    )  # fmt: skip
    data = DataConfig(encoder_seq_length=tokens, decoder_seq_length=tokens)
    precision = PrecisionConfig.model_validate({"dtype": dtype})
    return RunConfig(model=model, data=data, parallel=ParallelConfig(**parallel), precision=precision)


def timed_layers(config: RunConfig, parallel: TensorParallel, device: str = "cpu") -> Iterator[list[Call]]:
    """Yield encoder, then decoder layers of one shape on `device`, ready to be called."""
    context = ModelContext.of(config, parallel, select_kernels(device))
    tokens, hidden, dtype = config.data.encoder_seq_length, config.model.hidden_size, DTYPES[config.precision.dtype]
    mine = tokens // parallel.size if parallel.sequence_parallel else tokens
    options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": True}
    state, memory = (torch.randn(1, length, hidden, **options) for length in (mine, tokens))
    stream = Stream(torch.ones(1, tokens, dtype=torch.long, device=device), context.kernels)
    model = config.model
    for kind, branches, rest in (
        (EncoderLayer, model.layer_branches("encoder", 0), ()),
        (DecoderLayer, model.layer_branches("decoder", 0), (memory, stream)),
    ):
        layers = [
            kind(f"timed.{number}", context, branches).to(device=device, dtype=dtype)
            for number in range(LAYERS_IN_TURN)
        ]
        yield [partial(layer, state, stream, *rest) for layer in layers]


def compiled(layers: Sequence[Call]) -> None:
    """Let torch.compile fuse what `layers`, as `timed_layers` yields them, compute."""
    for layer in layers:
        assert isinstance(layer, partial) and isinstance(layer.func, nn.Module)
        compile_layers(layer.func)


def forward_and_backward(layer: Call, device: str = "cpu") -> tuple[float, float]:
    """Return the seconds of both passes: of the CPU's time of all its threads, or until a GPU is done."""
    now = time.process_time if device == "cpu" else partial(clock, device)
    begin = now()
    output = layer()
    middle = now()
    output.backward(torch.ones_like(output))
    return middle - begin, now() - middle


def memory_of(device: str) -> float:
    """Return the memory of the device, in GiB."""
    if device != "cpu":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
