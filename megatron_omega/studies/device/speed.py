"""How fast a device is on this model, and how much it holds, beside what the planner says.

Rates are judged on a GPU, which is nobody else's meanwhile. A CPU's are printed to be read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_omega import accounting
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig, Stack
from megatron_omega.engine.start import accelerator
from megatron_omega.host.shipped import presets
from megatron_omega.parallel.tensor_parallel import SERIAL
from megatron_omega.planner.activations import Shape, decoder_layer, encoder_layer, facts
from megatron_omega.planner.forecast import forecast
from megatron_omega.planner.hardware import Hardware
from megatron_omega.planner.machine import this_machine
from megatron_omega.planner.stages import Host, layer_seconds
from megatron_omega.planner.work import layer_works
from megatron_omega.studies.device.findings import Finding, LeftOut, Setting
from megatron_omega.studies.device.training import in_ranks
from megatron_omega.studies.kernel_rates import compiled, forward_and_backward, layer_config, timed_layers
from megatron_omega.studies.made_up import few, replica_batches, start_engine
from megatron_omega.studies.rehearsal import count_stage, fake_world

LARGEST_ERROR = 1.5
"""Times as long as planned that a layer or a step may take."""
COMPILED_SHARE = 0.95
"""Of the eager layers' time that compiled ones may take, or they should stay off."""
MEMORY_ERROR = 1.15
EXPOSED_SHARE = 0.3
"""Of a step's time that messages may be waited for."""
ROUNDS, STEPS, SMALL_STEPS = 10, 20, 10
SMALL_LAYER = (96, 768, 8, 128)
MESSAGE_WORDS = ("nccl", "gloo")

Interval = tuple[float, float]


def check_layers(setting: Setting) -> Iterator[Finding | LeftOut]:
    """Time a layer pair of omega-11.9b, eager and compiled, beside the planner; on a CPU a small eager one."""
    name = torch.cuda.get_device_name() if setting.on_gpu else "cpu"
    machine = this_machine(name)
    if machine is None:
        yield LeftOut("layers", f"the planner does not know {name}; megatron-omega calibrate measures it")
        return
    config = _large_layers() if setting.on_gpu else layer_config(SMALL_LAYER, recompute="none")
    eager, planned = pair_seconds(config, setting.device), planned_seconds(config, machine.hardware)
    limit = LARGEST_ERROR if setting.on_gpu else None
    what = "a layer pair of omega-11.9b" if setting.on_gpu else "a small layer pair"
    yield Finding("layers", f"{what}, eager: times the planner's {1e3 * planned:.3g} ms ({machine.origin})",
                  eager / planned, limit, detail=f"{1e3 * eager:.3g} ms")  # fmt: skip
    if setting.on_gpu:
        fused = pair_seconds(config, setting.device, is_compiled=True)
        advice = "training.compile: layers is worth it" if fused < COMPILED_SHARE * eager else "leave it off"
        yield Finding("layers", f"{what}, compiled: of eager's time", fused / eager, None, detail=advice)
        planned = planned_seconds(config, machine.hardware, is_compiled=True)
        yield Finding("layers", f"{what}, compiled: times the planner's {1e3 * planned:.3g} ms", fused / planned, limit)


def _large_layers() -> RunConfig:
    alone = {"parallel.tensor_parallel_size": "1", "parallel.pipeline_parallel_size": "1", "parallel.recompute": "none"}
    return load_config(presets()["omega-11.9b"], alone)


def pair_seconds(config: RunConfig, device: str, *, is_compiled: bool = False) -> float:
    """Return the seconds of both passes of an encoder and a decoder layer."""
    total = 0.0
    for layers in timed_layers(config, SERIAL, device):
        if is_compiled:
            compiled(layers)
        for layer in layers:  # the first pass allocates, and compiles
            forward_and_backward(layer, device)
        total += float(np.median([sum(forward_and_backward(layer, device)) for _ in range(ROUNDS) for layer in layers]))
    return total


def planned_seconds(config: RunConfig, hardware: Hardware, *, is_compiled: bool = False) -> float:
    """Return what the planner says of it."""
    works, dtype = layer_works(config), config.precision.dtype
    found = (
        layer_seconds(works[kind], hardware, dtype, Shape.of(config).element, 1, Host(is_compiled))
        for kind in ("encoder", "decoder")
    )
    return sum(seconds.forward + seconds.backward for seconds in found)


def check_memory(setting: Setting) -> Iterator[Finding]:
    """Compare what a layer keeps for its backward pass with the planner, to the byte; on a GPU a run's peak, too."""
    config = few(parallel={"recompute": "none"})
    for stack, (planned, counted) in kept_bytes(config).items():
        yield Finding("memory", f"bytes that an {stack} layer keeps, less the planner's {planned:,}"
                      .replace("an decoder", "a decoder"), abs(counted - planned), 0)  # fmt: skip
    if setting.on_gpu:
        config = _medium(setting)
        [(peak, *_), *_] = in_ranks(setting, steps_of, setting.ranks, config, 3)
        machine = this_machine(torch.cuda.get_device_name())
        if machine is not None:
            planned = forecast(config, setting.ranks, 1, machine.hardware).ranks[0].total
            yield Finding("memory", f"peak of omega-125m, times the {planned / 2**30:.2f} GiB forecast",
                          peak / planned, MEMORY_ERROR)  # fmt: skip


def kept_bytes(config: RunConfig) -> dict[str, tuple[int, int]]:
    """Return what the second layer of each stack keeps, in bytes: as planned, and as counted."""
    shape, model = Shape.of(config), config.model
    names = [cost.name for cost in accounting.layer_costs(config)]
    found = {}
    layers: tuple[tuple[Stack, Any], ...] = (("encoder", encoder_layer), ("decoder", decoder_layer))
    for stack, planned in layers:
        branches = model.layer_branches(stack, 1)
        first = names.index(f"{stack}.layers.1")
        with fake_world(1):
            counted = count_stage(config, first, first + 1).kept_bytes
        shared = facts(config, shape, *((branches, ()) if stack == "encoder" else ((), branches)))
        memory = shape.whole(shape.encoder) if stack == "decoder" else 0
        found[stack] = (planned(config, shape, branches), counted - shared - memory)
    return found


def check_steps(setting: Setting) -> Iterator[Finding | LeftOut]:
    """Train some steps: omega-125m on a GPU, a small model on a CPU. Losses fall; tokens, utilisation, messages."""
    config, steps = (_medium(setting), STEPS) if setting.on_gpu else (few(), SMALL_STEPS)
    results = in_ranks(setting, steps_of, setting.ranks, config, steps)
    _, losses, seconds, exposed = results[0]
    name = "omega-125m" if setting.on_gpu else "a small model"
    yield Finding("steps", f"{name}: loss after {steps} steps, of the first", losses[-1] / losses[0], 0.999)
    samples = config.batch.global_batch_size
    yield Finding(
        "steps", f"{name}: tokens", samples * accounting.tokens_per_sample(config) / seconds, None, "per second"
    )
    machine = this_machine(torch.cuda.get_device_name()) if setting.on_gpu else None
    if machine is None:
        yield LeftOut("steps", "utilisation and exposed messages are a known GPU's")
        return
    flops = samples * accounting.training_flops_per_sample(config)
    mfu = flops / seconds / setting.ranks / machine.hardware.peak(config.precision.dtype)
    planned = forecast(config, setting.ranks, 1, machine.hardware)
    yield Finding("steps", f"{name}: utilisation, planned {100 * planned.mfu:.1f}", 100 * mfu,
                  100 * planned.mfu / LARGEST_ERROR, "%", is_floor=True)  # fmt: skip
    yield Finding("steps", f"{name}: time in which only messages run", exposed / seconds, EXPOSED_SHARE, "of a step")


def _medium(setting: Setting) -> RunConfig:
    tensor = "2" if setting.ranks > 1 else "1"
    return load_config(
        presets()["omega-125m"],
        {"parallel.tensor_parallel_size": tensor, "parallel.pipeline_parallel_size": "1", "precision.dtype": "bf16"},
    )


def steps_of(config: RunConfig, steps: int) -> tuple[int, list[float], float, float]:
    """Return peak bytes, losses, the median seconds of a step, and of one step those of messages alone; in a rank."""
    engine, device = start_engine(config, 1), accelerator()
    batches = replica_batches(config, engine)
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(engine.train_step(batches, learning_rate=1e-3).loss)
        device.synchronize()
        seconds.append(time.perf_counter() - begin)
    on_gpu = engine.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    alone = 0.0
    if on_gpu:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            engine.train_step(batches, learning_rate=1e-3)
        alone = exposed_seconds(kernels_of(profiler))
    return peak, losses, float(np.median(seconds)), alone


def kernels_of(profiler: Any) -> list[tuple[str, float, float]]:
    """Return name, begin and end of everything that ran on the device, in seconds."""
    events = [event for event in profiler.events() if str(event.device_type).endswith("CUDA")]
    return [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]


def exposed_seconds(kernels: Sequence[tuple[str, float, float]]) -> float:
    """Return the seconds in which messages run and nothing else does.

    >>> exposed_seconds([("gemm", 0, 2), ("ncclAllReduce", 1, 4), ("gemm", 3, 3.5)])
    1.5
    """
    messages = [(begin, end) for name, begin, end in kernels if any(word in name.lower() for word in MESSAGE_WORDS)]
    others = [(begin, end) for name, begin, end in kernels if not any(word in name.lower() for word in MESSAGE_WORDS)]
    edges = sorted({edge for interval in (*messages, *others) for edge in interval})
    spans = [(begin, end) for begin, end in pairwise(edges) if _covers(messages, begin, end)]
    return sum(end - begin for begin, end in spans if not _covers(others, begin, end))


def _covers(intervals: Sequence[Interval], begin: float, end: float) -> bool:
    return any(first <= begin and end <= last for first, last in intervals)
