"""Whole steps of a small Omega on a device: where they compute, where they wait, what they compute, what they save."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.internals import loss_scaler_state
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import select_kernels
from megatron_omega.model.omega import Omega
from megatron_omega.studies.device.findings import Finding, LeftOut, Setting
from megatron_omega.studies.device.oracle import plain_losses, relative
from megatron_omega.studies.device.recording import Placement, watched_step
from megatron_omega.studies.layouts import tolerance_of
from megatron_omega.studies.made_up import few, micro_batch, replica_batches, start_engine

STEPS = 5
FP32_LIMIT = 2e-5
WAITS_AT_THE_END = 10
"""Losses, norm, whether it is finite, what clipping asks; ZeRO-2 asks for every group of parameters."""
TIMEOUT_SECONDS = 300.0
LARGE_SCALE = 2.0**32
"""A loss scale at which any fp16 gradient overflows."""


def in_ranks(setting: Setting, function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in ranks on the device, prepared as the setting says; return what each returned."""
    with patch.dict(os.environ, DS_ACCELERATOR=setting.device):
        return run_ranks(_prepared, ranks, setting.prepare, function, arguments, timeout_seconds=TIMEOUT_SECONDS)


def _prepared(prepare: Callable[[], None] | None, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if prepare is not None:
        prepare()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # DeepSpeed prints tables
        return function(*arguments)


def check_placement(setting: Setting) -> Iterator[Finding]:
    """Look for operations that compute elsewhere. A CPU has no elsewhere: there the model has no memory at all."""
    device = "cuda" if setting.on_gpu else "meta"
    config = few()
    batch = micro_batch(0, 2, config)
    with torch.device(device):
        model = Omega(ModelContext.of(config, kernels=select_kernels(setting.device)))
    inputs, (lm, mlm) = (tuple(part.to(device) for part in parts) for parts in (batch.inputs, batch.labels))
    factors = torch.ones(2, device=device)
    with Placement(device) as placement:
        model(inputs, (lm, mlm, factors)).backward()
    places = ", ".join(sorted(set(placement.elsewhere))[:5])
    yield Finding("placement", f"of {placement.operations:,} operations, those elsewhere", len(placement.elsewhere),
                  0, detail=places)  # fmt: skip


def check_waits(setting: Setting) -> Iterator[Finding]:
    """Count where a step waits for the device."""
    for dtype, stage in (("fp32", 0), ("bf16", 1)):
        [(found, places)] = in_ranks(setting, count_waits, 1, dtype, stage)
        among = [place for place in places if place.startswith("micro")]
        name = f"{dtype}, ZeRO-{stage}"
        yield Finding(
            "waits", f"{name}: among micro-batches", found.get("micro-batches", 0), 0, detail=", ".join(among[:3])
        )
        yield Finding("waits", f"{name}: at the end of a step", found.get("end", 0), WAITS_AT_THE_END)


def count_waits(dtype: str, stage: int) -> tuple[dict[str, int], list[str]]:
    """Return the waits of a step by phase, and where each was; in a rank."""
    config = few(precision={"dtype": dtype})
    engine = start_engine(config, stage)
    batches = replica_batches(config, engine)
    engine.train_step(batches, learning_rate=1e-3)
    waits = watched_step(engine, lambda: engine.train_step(batches, learning_rate=1e-3))
    return dict(waits.found), waits.places


def check_losses(setting: Setting) -> Iterator[Finding | LeftOut]:
    """Compare losses with a training in fp64 on the CPU: fp32 closely, bf16 within its band; overflows of fp16."""
    meant = plain_losses(few(), STEPS)
    for dtype, stage in (("fp32", 0), ("bf16", 1)):
        config = few(precision={"dtype": dtype})
        [found] = in_ranks(setting, losses, 1, config, STEPS, stage)
        limit = FP32_LIMIT if dtype == "fp32" else tolerance_of(config)
        yield Finding("losses", f"{dtype}: of {STEPS} steps, relative to fp64", relative(found, meant), limit)
    if not setting.on_gpu:
        yield LeftOut("losses", "fp16: DeepSpeed has none on a CPU")
        return
    [(scales, skipped)] = in_ranks(setting, overflow, 1)
    yield Finding("losses", f"fp16: steps skipped from a loss scale of {LARGE_SCALE:.0e}", skipped, 1, is_floor=True)
    yield Finding("losses", "fp16: the loss scale after them, of the first", scales[-1] / scales[0], 0.5)


def losses(config: RunConfig, steps: int, stage: int) -> list[float]:
    """Return the losses of some steps of the engine; in a rank."""
    engine = start_engine(config, stage)
    batches = replica_batches(config, engine)
    return [engine.train_step(batches, learning_rate=config.optimizer.learning_rate).loss for _ in range(steps)]


def overflow() -> tuple[list[float], int]:
    """Return the loss scale before and after some steps from far too large a one, and the steps skipped; in a rank."""
    config = few(precision={"dtype": "fp16"})
    engine = start_engine(config, 1)
    engine.deepspeed.optimizer.loss_scaler.cur_scale = LARGE_SCALE
    batches, scales, skipped = replica_batches(config, engine), [LARGE_SCALE], 0
    for _ in range(STEPS):
        skipped += engine.train_step(batches, learning_rate=1e-3).skipped
        scales.append(loss_scaler_state(engine.deepspeed.optimizer).get("cur_scale", math.nan))
    return scales, skipped


def check_resume(setting: Setting) -> Iterator[Finding]:
    """Save, load into a new engine, and go on: the same losses to the last bit."""
    for dtype, stage in (("fp32", 1), ("bf16", 2)):
        with tempfile.TemporaryDirectory(prefix="check-device-") as folder:
            [(unbroken, resumed)] = in_ranks(setting, resume, 1, dtype, stage, Path(folder))
        differing = sum(one != other for one, other in zip(unbroken, resumed, strict=True))
        yield Finding("resume", f"{dtype}, ZeRO-{stage}: of {len(resumed)} losses, those that differ", differing, 0)


def resume(dtype: str, stage: int, folder: Path) -> tuple[list[float], list[float]]:
    """Return the losses after a save, without and with a load in between; in a rank."""
    config = few(precision={"dtype": dtype})
    with _repeatable():
        engine = start_engine(config, stage)
        batches = replica_batches(config, engine)
        for _ in range(2):
            engine.train_step(batches, learning_rate=1e-3)
        _store(config, engine, folder).save(engine, {}, step=2, asynchronous=False)
        unbroken = [engine.train_step(batches, learning_rate=1e-3).loss for _ in range(2)]
        again = start_engine(config, stage)
        _store(config, again, folder).load_latest(again)
        batches = replica_batches(config, again, consumed=2 * config.batch.global_batch_size)
        return unbroken, [again.train_step(batches, learning_rate=1e-3).loss for _ in range(2)]


@contextmanager
def _repeatable() -> Iterator[None]:
    """Take kernels that always add up in one order, as `training.deterministic` does."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)


def _store(config: RunConfig, engine: Engine, folder: Path) -> CheckpointStore:
    identity = {"model": config.model.model_dump(mode="json")}
    return CheckpointStore(
        folder, config=config.checkpoint, topology=engine.topology, identity=identity, run_config={"made up": True}
    )
