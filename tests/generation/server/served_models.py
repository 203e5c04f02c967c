"""Servers of small random models, in this process."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient
from written_models import tiny_config, tiny_model, tiny_tokenizer

from megatron_omega.export.loading import TextModel
from megatron_omega.generation.requests import Event, Limits
from megatron_omega.generation.scheduler import Scheduler
from megatron_omega.generation.server.app import Application
from megatron_omega.generation.server.bounds import LOOPBACK_NAMES, Bounds
from megatron_omega.generation.server.served import Served
from megatron_omega.generation.server.worker import Worker

SHAPES: dict[str, dict[str, Any]] = {
    "omega": {},
    "decoder": {"encoder_layers": 0},
    "t5": {"encoder_branches": ["full"], "decoder_branches": ["causal"], "mlm_head": False},
}
BOUNDS = Bounds(body_bytes=1 << 16, prompt_tokens=90, new_tokens=64, queue=12, body_seconds=30, answer_seconds=120)


def text_model(shape: str) -> TextModel:
    config = tiny_config(model=SHAPES[shape])
    return TextModel(tiny_model(config), config, tiny_tokenizer(), Path("/nowhere"))


def application(*shapes: str, **bounds: Any) -> Application:
    found = replace(BOUNDS, **bounds)
    return Application([Served.of(shape, text_model(shape), found, Limits()) for shape in shapes], found)


def client_of(app: Application, key: str | None = None) -> TestClient:
    door = app.behind_door(key, LOOPBACK_NAMES)
    return TestClient(door, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


class GatedScheduler(Scheduler):
    """A scheduler that takes a step when it is let."""

    def __init__(self, model: TextModel, gate: threading.Semaphore) -> None:
        super().__init__(model, Limits())
        self.gate = gate
        self._has_cancelled = False
        self.cancelled: list[int] = []

    def step(self) -> list[Event]:
        # Without a step it comes back soon, so that its thread hears commands. What is cancelled needs one.
        if not (self._has_cancelled or self.gate.acquire(timeout=0.01)):
            return []
        self._has_cancelled = False
        return super().step()

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        self._has_cancelled = True
        super().cancel(number)


class Gated:
    """A server of one model whose steps are let one by one."""

    def __init__(self, **bounds: Any) -> None:
        self.gate = threading.Semaphore(0)
        found = replace(BOUNDS, **bounds)
        model = text_model("omega")
        self.schedulers: list[GatedScheduler] = []
        served = Served("omega", model, Worker(lambda: self._scheduler(model), found.queue), found)
        self.app = Application([served], found)
        self.worker = served.worker
        self.door = self.app.behind_door(None, LOOPBACK_NAMES)

    def _scheduler(self, model: TextModel) -> GatedScheduler:
        self.schedulers.append(GatedScheduler(model, self.gate))
        return self.schedulers[-1]

    def open(self) -> None:
        self.gate.release(1_000_000)
