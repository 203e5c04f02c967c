"""The training loop as a story: start or resume, step, validate, save, end. Everything else is a hook.

Knows the engine, the checkpoint store and where batches come from; knows nothing of models, corpora or displays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import CheckpointError
from megatron_omega.log import get_logger
from megatron_omega.training.batch_size import batch_size_at
from megatron_omega.training.engine import Engine, MicroBatch
from megatron_omega.training.hooks import Hook
from megatron_omega.training.schedule import learning_rate_fraction
from megatron_omega.training.state import EvaluationReport, RunContext, StepReport, TrainState

log = get_logger(__name__)

OpenBatches = Callable[[int], AbstractContextManager[Iterator[MicroBatch]]]
"""From a number of consumed samples to this replica's micro-batches from there on."""


class Store(Protocol):
    """What the loop asks of the checkpoint store."""

    directory: Path

    def save(
        self,
        engine: Any,
        state: Any,
        *,
        step: int,
        asynchronous: bool | None = None,
        validation_loss: float | None = None,
    ) -> None: ...
    def wait(self) -> CheckpointError | None: ...
    def load_latest(self, engine: Any) -> Any: ...
    def load(self, engine: Any, path: Path | str, weights_only: bool = False) -> Any: ...


@dataclass(frozen=True)
class Batches:
    """Where micro-batches come from."""

    train: OpenBatches
    validation: OpenBatches | None
    """None where the corpus has no validation part."""


class Trainer:
    """Runs a configured training from wherever it stands to its last step."""

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        store: Store,
        batches: Batches,
        hook: Hook,
        *,
        flops_per_sample: float,
        peak_flops: float,
    ) -> None:
        """`flops_per_sample`: of forward and backward; `peak_flops`: of all devices together, FLOP/s."""
        self.config = config
        self.engine = engine
        self.store = store
        self.batches = batches
        self.hook = hook
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._validation_loss: float | None = None
        self._saving: tuple[Path, int] | None = None
        self._saved_step = -1

    def run(self, context: RunContext) -> TrainState:
        """Train to the end; return where it stands. `context.state` is replaced by what a checkpoint says."""
        try:
            state = self._load()
            self.hook.on_start(replace(context, state=state))
            state = self._train(state)
            self._save(state, asynchronous=False)
        except BaseException as error:
            self.hook.on_error(error)
            raise
        finally:
            self.hook.on_close()
        return state

    def _load(self) -> TrainState:
        """Return the state of the checkpoint to go on from, or a new one. Resuming has precedence over loading."""
        checkpoint = self.config.checkpoint
        saved = self.store.load_latest(self.engine.deepspeed) if checkpoint.resume else None
        if saved is None and checkpoint.load is not None:
            weights_only = checkpoint.load_weights_only
            saved = self.store.load(self.engine.deepspeed, checkpoint.load, weights_only=weights_only)
            log.info("loaded %s%s", checkpoint.load, " (weights only)" if weights_only else "")
            saved = None if weights_only else saved
        if saved is None:
            return TrainState()
        state = TrainState.from_json(saved)
        self._saved_step = state.step
        log.info("going on after step %d (%d samples)", state.step, state.consumed_samples)
        return state

    def _train(self, state: TrainState) -> TrainState:
        total, evaluation, checkpoint = self.config.training.train_steps, self.config.evaluation, self.config.checkpoint
        if state.step == 0 and evaluation.interval_steps:
            state = self._evaluate(state)
        with self.batches.train(state.consumed_samples) as batches:
            while state.step < total:
                self.hook.on_step_begin(state.step + 1)
                state = self._step(state, batches)
                if evaluation.interval_steps and (state.step % evaluation.interval_steps == 0 or state.step == total):
                    state = self._evaluate(state)
                if checkpoint.interval_steps and state.step % checkpoint.interval_steps == 0 and state.step < total:
                    self._save(state)
        return state

    def _step(self, state: TrainState, batches: Iterator[MicroBatch]) -> TrainState:
        config, begin = self.config, time.monotonic()
        samples = batch_size_at(config.batch, state.consumed_samples)
        self.engine.set_global_batch_size(samples)
        fraction = learning_rate_fraction(config.schedule, state.step, config.training.train_steps)
        learning_rate = config.optimizer.learning_rate * fraction
        result = self.engine.train_step(batches, learning_rate=learning_rate)
        seconds = time.monotonic() - begin
        state = replace(
            state,
            step=state.step + 1,
            consumed_samples=state.consumed_samples + samples,
            consumed_tokens=state.consumed_tokens + result.num_tokens,
            skipped_steps=state.skipped_steps + result.skipped,
        )
        self.hook.on_step_end(
            StepReport(
                step=state.step,
                loss=result.loss,
                lm_loss=result.lm_loss,
                mlm_loss=result.mlm_loss,
                grad_norm=result.grad_norm,
                learning_rate=learning_rate,
                consumed_samples=state.consumed_samples,
                consumed_tokens=state.consumed_tokens,
                tokens_per_second=result.num_tokens / seconds,
                step_seconds=seconds,
                mfu=self._flops_per_sample * samples / seconds / self._peak_flops,
                skipped=result.skipped,
            )
        )
        return state

    def _evaluate(self, state: TrainState) -> TrainState:
        if self.batches.validation is None:
            return state
        begin = time.monotonic()
        self.engine.set_global_batch_size(self.config.batch.global_batch_size)
        count = self.engine.num_micro_batches * self.config.evaluation.num_batches
        with self.batches.validation(0) as batches:  # from the first sample: the same ones every time
            result = self.engine.evaluate(batches, count)
        mlm = 0.0 if math.isnan(result.mlm_loss) else self.config.objective.mlm_weight * result.mlm_loss
        loss = result.lm_loss + mlm
        seconds = time.monotonic() - begin
        self.hook.on_evaluate(
            EvaluationReport(state.step, loss, result.lm_loss, result.mlm_loss, result.num_tokens, seconds)
        )
        self._validation_loss = loss
        best = loss if state.best_validation_loss is None else min(loss, state.best_validation_loss)
        return replace(state, best_validation_loss=best if math.isfinite(best) else state.best_validation_loss)

    def _save(self, state: TrainState, *, asynchronous: bool | None = None) -> None:
        self._settle()
        if self._saved_step == state.step:
            return
        self.store.save(
            self.engine.deepspeed,
            state.to_json(),
            step=state.step,
            asynchronous=asynchronous,
            validation_loss=self._validation_loss,
        )
        self._saved_step = state.step
        self._saving = (self.store.directory / f"step-{state.step:08d}", state.step)
        if asynchronous is False:
            self._settle()

    def _settle(self) -> None:
        """Wait for the save in progress, and tell the hooks of it if it succeeded."""
        error = self.store.wait()
        if self._saving is not None and error is None:
            self.hook.on_checkpoint(*self._saving)
        self._saving = None
