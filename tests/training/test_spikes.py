"""When a step is bad, when the run goes back, and where to: the loop against an engine that only says losses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.config.schema import ResilienceConfig, RunConfig
from megatron_omega.engine.results import EvaluationResult, StepResult
from megatron_omega.errors import OmegaError
from megatron_omega.training.batch_size import Interval
from megatron_omega.training.hooks import Hook
from megatron_omega.training.loop import Batches, Trainer
from megatron_omega.training.spikes import judge, remember, z_score
from megatron_omega.training.state import BadStep, Fault, Rollback, RunContext, StepReport, TrainState

CALM = [2.0 + 0.01 * (index % 5) for index in range(16)]


def test_the_score_is_one_of_a_normal_distribution() -> None:
    assert z_score(13.0, [9.0, 10.0, 11.0]) == pytest.approx(3 / 1.4826)
    assert z_score(2.5, CALM) > 8 > z_score(2.1, CALM)
    assert z_score(2.0, [2.0] * 8) == 0 and math.isfinite(z_score(3.0, [2.0] * 8))


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 20), min_size=16, max_size=64), st.floats(0.1, 20))
def test_lower_is_never_bad_and_what_is_not_finite_always(recent: list[float], loss: float) -> None:
    config = ResilienceConfig()
    assert judge(min(loss, *recent), recent, config)[0]
    assert not any(judge(bad, recent, config)[0] for bad in (math.nan, math.inf))
    assert judge(1e9, recent[:15], config)[0], "judged before a quarter of the window is there"
    assert judge(loss, recent, ResilienceConfig(spike_z_score=0))[0]
    assert remember(loss, recent, config) == (*recent, loss)[-64:]


class FakeEngine:
    """Says one loss for each sample number; steps that are refused or not finite are skipped."""

    deepspeed = None
    num_micro_batches = 1

    def __init__(self, loss_of: Any) -> None:
        self.loss_of = loss_of
        self.validation_losses: list[float] = []
        self.weights: list[int] = []
        """The samples trained on: what a checkpoint of this engine holds."""

    def set_global_batch_size(self, size: int) -> None:
        self.size = size

    def train_step(self, batches: Iterator[int], *, learning_rate: float, accept: Any) -> StepResult:
        samples = [next(batches) for _ in range(self.size)]
        loss = self.loss_of(samples[0])
        skipped = not math.isfinite(loss) or (accept is not None and not accept(loss))
        self.weights += [] if skipped else samples
        return StepResult(loss, loss, math.nan, 1.0, skipped, self.size)

    def evaluate(self, batches: Any, num_micro_batches: int) -> EvaluationResult:
        return EvaluationResult(self.validation_losses.pop(0), math.nan, 10)


class FakeStore:
    """Keeps checkpoints in a dictionary."""

    directory = Path("nowhere")

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.kept: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self.saved: list[int] = []
        self.validation_losses: dict[int, float | None] = {}

    def save(self, engine: Any, state: Any, *, step: int, validation_loss: float | None = None, **_: Any) -> None:
        json.dumps([state, validation_loss], allow_nan=False)  # as a manifest holds them
        self.kept[step] = (state, list(self.engine.weights))
        self.validation_losses[step] = validation_loss
        self.saved.append(step)

    def wait(self) -> None:
        return None

    def load_latest(self, engine: Any) -> None:
        return None

    def roll_back(self, engine: Any, up_to_step: int) -> Any:
        good = [step for step in self.kept if step <= up_to_step]
        if not good:
            return None
        self.kept = {step: self.kept[step] for step in good}
        state, weights = self.kept[max(good)]
        self.engine.weights[:] = weights
        return state


class Story(Hook):
    """Writes down what happened."""

    def __init__(self) -> None:
        self.bad: list[BadStep] = []
        self.back: list[Rollback] = []
        self.steps: list[int] = []
        self.faults: list[Fault] = []

    def on_step_end(self, report: StepReport) -> None:
        self.steps.append(report.step)

    def on_bad_step(self, report: BadStep) -> None:
        self.bad.append(report)

    def on_rollback(self, rollback: Rollback) -> None:
        self.back.append(rollback)

    def on_fault(self, fault: Fault) -> None:
        self.faults.append(fault)


@contextmanager
def numbers(consumed: int, left_out: Sequence[Interval]) -> Iterator[Iterator[int]]:
    yield (
        sample
        for sample in range(consumed, 10_000)
        if not any(start <= sample < stop for start, stop in left_out)
    )  # fmt: skip


def train(
    loss_of: Any,
    guard: Any = None,
    validation_losses: Sequence[float] = (),
    scores: Sequence[float] = (),
    patience: int = 0,
    **resilience: Any,
) -> tuple[TrainState, FakeEngine, FakeStore, Story]:
    config = RunConfig.model_validate(
        {
            "batch": {"global_batch_size": 4}, "training": {"train_steps": 40}, "evaluation": {"interval_steps": 10 if validation_losses else 0, "num_batches": 1, "patience": patience},
            "checkpoint": {"interval_steps": 10}, "resilience": {"spike_window": 16, **resilience},
            "precision": {"dtype": "fp32"},
        }
    )  # fmt: skip
    engine, story = FakeEngine(loss_of), Story()
    store, fake, opened = FakeStore(engine), engine, numbers
    engine.validation_losses = list(validation_losses)
    batches = Batches(opened, opened if validation_losses else None)  # pyright: ignore[reportArgumentType]
    given = iter(scores)
    answer = (lambda beat: {"qa exact_match": next(given)}) if scores else None
    measures: dict[str, Any] = {"flops_per_sample": 1.0, "peak_flops": 1.0, "weight_check": guard, "answer": answer}
    trainer = Trainer(config, fake, store, batches, story, **measures)  # pyright: ignore[reportArgumentType]
    state = trainer.run(RunContext(config, Path("nowhere"), TrainState()))
    return state, engine, store, story


def calm(sample: int) -> float:
    return CALM[sample // 4 % 16]


def but(samples: range, value: float) -> Any:
    return lambda sample: value if sample in samples else calm(sample)


def test_single_spikes_are_skipped_and_nothing_more() -> None:
    state, engine, store, story = train(but(range(60, 68), 9.0))
    assert [(bad.step, bad.cause, bad.in_a_row) for bad in story.bad] == [(16, "loss spike", 1), (17, "loss spike", 2)]
    assert story.bad[0].samples == ((60, 64),) and state.skipped_steps == 2 and state.bad_steps == 0
    assert not story.back and engine.weights == [*range(60), *range(68, 160)]
    assert 9.0 not in state.recent_losses and store.saved == [10, 20, 30, 40]


@pytest.mark.parametrize("value", [9.0, math.nan])
def test_a_window_is_passed_over_and_the_rest_replayed(value: float) -> None:
    state, engine, _, story = train(but(range(64, 88), value))  # steps 17 to 22: a save falls due at 20
    assert [(back.from_step, back.to_step) for back in story.back] == [(19, 10), (19, 10)]
    assert state.left_out == ((64, 88),) and state.step == 40
    assert engine.weights == [*range(64), *range(88, 184)] and state.consumed_samples == 184
    assert story.steps[:19] == list(range(1, 20)) and story.steps[-1] == 40
    assert state.rollbacks == 2 and TrainState.from_json(state.to_json()) == state


def test_no_checkpoint_of_a_bad_streak_is_gone_back_to() -> None:
    state, _, store, story = train(but(range(76, 88), 9.0))  # steps 20, 21, 22
    assert [(back.from_step, back.to_step) for back in story.back] == [(22, 10)]
    assert store.saved == [10, 20, 30, 40] and store.kept[20][0]["bad_steps"] == 0
    assert state.left_out == ((76, 88),)


def test_without_a_checkpoint_the_window_is_left_behind() -> None:
    state, engine, _, story = train(but(range(20, 32), 9.0))  # steps 6, 7, 8
    assert [(back.from_step, back.to_step) for back in story.back] == [(8, 8)]
    assert engine.weights == [*range(20), *range(32, 160)] and state.rollbacks == 1 and state.left_out == ()


def test_a_run_gives_up_at_last() -> None:
    with pytest.raises(OmegaError, match=r"3 bad steps in a row, up to step .*max_rollbacks=2"):
        train(but(range(64, 9999), 9.0), max_rollbacks=2)


def test_a_spike_is_left_alone_where_nobody_asked() -> None:
    state, engine, _, story = train(but(range(60, 80), 9.0), spike_z_score=0)
    assert not story.bad and engine.weights == list(range(160)) and state.skipped_steps == 0


class OneFault(SimpleNamespace):
    """Finds a fault at its `at`-th look."""

    interval_steps = 4
    looks = 0
    forgotten = 0

    def find_fault(self) -> Fault | None:
        self.looks += 1
        return Fault("silent_fault", "weights of rank 1 differ", (1,), {}) if self.looks == self.at else None

    def forget(self) -> None:
        self.forgotten += 1


def test_weights_that_differ_send_the_run_back_with_all_its_data() -> None:
    guard = OneFault(at=8)  # looks after 4, 8, 10, 12, 16, 20, 24, 28
    state, engine, _, story = train(calm, guard)
    assert [(back.from_step, back.to_step) for back in story.back] == [(28, 20)] and guard.forgotten == 1
    assert state.left_out == () and engine.weights == list(range(160)) and [f.ranks for f in story.faults] == [(1,)]


def test_a_checkpoint_of_weights_that_differ_is_not_written() -> None:
    guard = OneFault(at=3)
    with pytest.raises(OmegaError, match=r"after step 10: weights of rank 1 differ; there is no checkpoint"):
        train(calm, guard)


def test_a_validation_that_is_not_a_number_is_stored_as_none_and_saved() -> None:
    losses = (5.0, math.nan, 3.0, math.inf, 4.0)  # at the start, and of steps 10 to 40
    state, _, store, _ = train(calm, validation_losses=losses)
    assert store.saved == [10, 20, 30, 40]
    assert store.validation_losses == {10: None, 20: 3.0, 30: None, 40: 4.0}
    assert state.best_validation_loss == 3.0 and state.validated_step == 40


def test_a_run_ends_when_validations_stay_fruitless_and_knows_the_best() -> None:
    scores = (0.1, 0.5, 0.4, 0.5, 0.9)  # at the start, and of steps 10 to 40
    losses = (5.0, 4.0, 3.0, 4.5, 1.0)
    state, _, store, _ = train(calm, validation_losses=losses, scores=scores, patience=2)
    assert (state.step, state.best_step, state.best_score, state.fruitless_validations) == (30, 10, 0.5, 2)
    assert store.saved == [10, 20, 30] and store.kept[30][0]["score"] == 0.5
    state, *_ = train(calm, validation_losses=losses, scores=scores, patience=3)
    assert (state.step, state.best_step, state.best_score) == (40, 40, 0.9)
    state, *_ = train(calm, validation_losses=losses, patience=1)  # by its losses
    assert (state.step, state.best_step, state.best_validation_loss) == (30, 20, 3.0)
