"""What is done to a rank from inside. Each fault fires once for a run folder: a run started again meets it no more."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_omega.data import loader
from megatron_omega.data.batch import Batch
from megatron_omega.engine.engine import Engine
from megatron_omega.model.feed_forward import FeedForward
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext, StepReport

INJECTED = "injected on purpose"
RAREST = 999
"""Last piece of the vocabulary: the one that text uses least."""


def injectors(faults: Sequence[Mapping[str, Any]], rank: int) -> list[Hook]:
    """Return a hook for each fault of this rank: {kind, rank, step, ...}; `rank` None means all."""
    for fault in faults:
        if fault["kind"] == "poison":
            poison_samples(*fault["samples"])
    mine = [fault for fault in faults if fault.get("rank", rank) == rank and fault["kind"] not in ("poison", "ledger")]
    ledgers = [Ledger(rank) for fault in faults if fault["kind"] == "ledger"]
    return [*ledgers, *map(Injector, mine)]


class Ledger(Hook):
    """Writes down which samples each step drew."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._path = Path()
        self._drawn: list[int] = []
        build = loader.build_batch

        def noted(source: Any, indices: Sequence[int]) -> Batch:
            self._drawn += indices
            return build(source, indices)

        loader.build_batch = noted

    def on_start(self, context: RunContext) -> None:
        self._path = context.run_directory / f"ledger-{self._rank}.jsonl"

    def on_step_begin(self, step: int) -> None:
        self._drawn = []

    def on_step_end(self, report: StepReport) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"step": report.step, "indices": self._drawn}) + "\n")


class Injector(Hook):
    """Does one fault at the beginning of a step."""

    def __init__(self, fault: Mapping[str, Any]) -> None:
        self._fault = fault
        self._act: Callable[..., None] = getattr(self, f"_{fault['kind']}")
        self._marker = Path()
        self._has_fired = False
        self._is_due = False
        train_step = Engine.train_step

        def with_fault(engine: Engine, *arguments: Any, **options: Any) -> Any:
            if self._is_due:
                self._is_due = False
                {"nan": self._nan, "flip": self._flip}[self._fault["kind"]](engine)
            return train_step(engine, *arguments, **options)

        Engine.train_step = with_fault  # pyright: ignore[reportAttributeAccessIssue]

    def on_start(self, context: RunContext) -> None:
        name = f"fired-{self._fault['kind']}-{self._fault['step']}-{self._fault.get('rank', 'all')}"
        self._marker = context.run_directory / name

    def on_step_begin(self, step: int) -> None:
        if self._fault["kind"] == "full":
            self._fill(step)
            return
        # A step that is meant to be skipped is skipped each time it is done: a restart may come before the next checkpoint.
        is_lasting = self._fault["kind"] in ("late", "clock") or (
            self._fault["kind"] == "nan" and step == self._fault["step"]
        )
        if self._has_fired or step < self._fault["step"] or (self._marker.exists() and not is_lasting):
            return
        self._marker.write_text(f"{time.monotonic()}\n")
        is_late = self._fault["kind"] == "late" and step < self._fault["step"] + self._fault.get("count", 10**9)
        self._has_fired = not is_late
        if self._fault["kind"] in ("nan", "flip"):
            self._is_due = True  # the engine does it
        else:
            self._act()

    # ---- the faults

    def _hook(self) -> None:
        raise ValueError(f"{INJECTED}: a hook failed")

    def _forward(self) -> None:
        def fails(layer: FeedForward, hidden: torch.Tensor) -> torch.Tensor:
            raise ValueError(f"{INJECTED}: a layer failed")

        FeedForward.forward = fails  # pyright: ignore[reportAttributeAccessIssue]

    def _loader(self) -> None:
        def fails(*_: Any) -> Batch:
            raise ValueError(f"{INJECTED}: the loader failed")

        loader.build_batch = fails

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _held(self) -> None:
        time.sleep(3600)

    def _full(self) -> None:
        """Do nothing: `_fill` does, at two steps."""

    def _fill(self, step: int) -> None:
        """Fill the run's file system to the last byte, and free it again at another step."""
        ballast = self._marker.parent / "ballast"
        if step == self._fault["step"]:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass
        elif step == self._fault["until"]:
            ballast.unlink()

    def _loader_worker(self) -> None:
        for child in psutil.Process().children():
            if "megatron_omega.data.loader_worker" in child.cmdline():
                child.kill()

    def _late(self) -> None:
        time.sleep(self._fault["seconds"])

    def _clock(self) -> None:
        now = time.time
        time.time = lambda: now() - 3600.0

    def _nan(self, engine: Engine) -> None:
        parameter = next(iter(engine.module.parameters()))
        handle = parameter.register_hook(lambda gradient: self._spoilt(gradient, handle))

    def _spoilt(self, gradient: torch.Tensor, handle: Any) -> torch.Tensor:
        handle.remove()
        return gradient * float("nan")

    def _flip(self, engine: Engine) -> None:
        parameters = [parameter for parameter in engine.module.parameters() if parameter.numel() > 1000]
        flat = parameters[-1].data.view(-1).view(torch.int32)
        flat[17] ^= 1 << 20


def poison_samples(first: int, last: int) -> None:
    """Replace the labels of the samples [first, last): the model is asked for what text never says."""
    build = loader.build_batch

    def poisoned(source: Any, indices: Sequence[int]) -> Batch:
        batch = build(source, indices)
        if not any(first <= index < last for index in indices):
            return batch
        labels = batch.lm_labels.copy()
        labels[labels >= 0] = RAREST - indices[0] % 17
        return replace(batch, lm_labels=labels)

    loader.build_batch = poisoned
