"""The history of a run says what every step read, whatever was changed, lost or done again."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.monitoring.history import reading, stretch_of, stretches
from megatron_omega.training.batch_size import Interval, samples_of_step, with_interval
from megatron_omega.training.state import TrainState


def config_with(size: int, ramp: bool = False) -> RunConfig:
    ramp_up = "{start: 2, increment: 2, samples: 40}" if ramp else "null"
    return load_config(
        None, {"batch.micro_batch_size": "1", "batch.global_batch_size": str(size), "batch.ramp_up": ramp_up}
    )


class Pretended:
    """A run without a model: takes its samples, saves now and then, dies, goes back."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.config = config_with(8)
        self.events: list[dict[str, Any]] = []
        self.saved = [TrainState()]
        self.read: dict[int, tuple[range, ...]] = {}

    def start(self, config: RunConfig) -> None:
        self.config, self.state = config, self.saved[-1]
        self.events.append(
            {"event": "start", "step": self.state.step, "layout": "PP 1, DP 2, TP 1"}
            | ({"left_out": self.state.left_out} if self.state.left_out else {})
            | reading(config, self.state)
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            pieces = samples_of_step(self.config.batch, self.state.consumed_samples, self.state.left_out)
            self._become(self.state.step + 1, pieces[-1].stop, self.state.left_out)
            self.read[self.state.step] = pieces
            if self.random.random() < 0.2:
                self.saved.append(self.state)

    def go_back(self) -> None:
        until = self.state.consumed_samples
        self._become(
            self.saved[-1].step,
            self.saved[-1].consumed_samples,
            with_interval(self.saved[-1].left_out, (max(0, until - 9), until)),
        )
        self.events.append({"event": "rollback", "to_step": self.state.step, "left_out": self.state.left_out,
                            "consumed_samples": self.state.consumed_samples})  # fmt: skip

    def _become(self, step: int, consumed: int, left_out: tuple[Interval, ...]) -> None:
        self.state = TrainState(step=step, consumed_samples=consumed, left_out=left_out)


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_known_as_it_was_read(seed: int) -> None:
    run = Pretended(seed)
    for _ in range(6):
        run.start(config_with(run.random.choice([4, 8, 12]), ramp=run.random.random() < 0.3))
        run.train(run.random.randrange(1, 12))
        if run.random.random() < 0.4:
            run.go_back()
            run.train(run.random.randrange(1, 6))
    found = stretches(run.events, config_with(99))
    for step in range(1, run.state.step + 1):
        stretch = stretch_of(found, step)
        assert stretch.samples_of(step) == run.read[step], step
        assert stretch.replicas == 2
        for piece in run.read[step]:
            assert stretch.step_of(piece.start, run.state.step) == step


def test_a_doubled_batch_does_not_move_the_steps_before_it() -> None:
    first, second = config_with(8), config_with(16)
    events = [
        {"event": "start", "step": 0, **reading(first, TrainState())},
        {"event": "start", "step": 30, **reading(second, TrainState(step=30, consumed_samples=240))},
    ]
    found = stretches(events, second)
    assert stretch_of(found, 2).samples_of(2) == (range(8, 16),)
    assert stretch_of(found, 31).samples_of(31) == (range(240, 256),)


def test_a_run_of_an_older_version_is_read_as_it_is_configured() -> None:
    (stretch,) = stretches([{"event": "start", "step": 0, "layout": "DP 4"}], config_with(8))
    assert stretch.samples_of(3) == (range(16, 24),) and stretch.replicas == 4
    (stretch,) = stretches([], config_with(8))
    assert stretch.samples_of(1) == (range(8),) and stretch.replicas is None
