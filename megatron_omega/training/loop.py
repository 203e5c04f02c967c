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
from megatron_omega.errors import CheckpointError, Preempted
from megatron_omega.log import get_logger
from megatron_omega.training.batch_size import batch_size_at
from megatron_omega.training.engine import Engine, EvaluationResult, MicroBatch, pooled
from megatron_omega.training.hooks import Hook
from megatron_omega.training.schedule import learning_rate_fraction
from megatron_omega.training.state import EvaluationReport, RunContext, StepReport, TrainState

log = get_logger(__name__)

StopRequested = Callable[[], str | None]
"""Why the run is to stop now, the same on all ranks, or None. Collective."""
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
        stop_requested: StopRequested = lambda: None,
    ) -> None:
        """`flops_per_sample`: of forward and backward; `peak_flops`: of all devices together, FLOP/s."""
        self.config = config
        self.engine = engine
        self.store = store
        self.batches = batches
        self.hook = hook
        self._flops_per_sample = flops_per_sample
        self._peak_flops = peak_flops
        self._stop_requested = stop_requested
        self._stop_reason: str | None = None
        self._validation_loss: float | None = None
        self._saving: tuple[Path, int] | None = None
        self._saved_step = -1

    def run(self, context: RunContext) -> TrainState:
        """Train to the end; return where it stands. `context.state` is replaced by what a checkpoint says.

        Raises Preempted where the run was asked to stop: everything is saved then.
        """
        try:
            self.hook.on_phase("loading a checkpoint", 0)
            state = self._load()
            self.hook.on_start(replace(context, state=state))
            state = self._train(state)
            self._save_for_good(state)
            if state.step < self.config.training.train_steps or self._validation_is_due(state):
                raise Preempted(f"stopped after step {state.step}: {self._stop_reason}; start again to continue")
        except Preempted:
            raise
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
        """Do the steps that are left, or those before the run is asked to stop."""
        total, checkpoint = self.config.training.train_steps, self.config.checkpoint
        with self.batches.train(state.consumed_samples) as batches:
            while not self._is_asked_to_stop():
                if self._validation_is_due(state):
                    state = self._evaluate(state)
                    if self._stop_reason is not None:
                        break
                if state.step >= total:
                    break
                if checkpoint.interval_steps and state.step and state.step % checkpoint.interval_steps == 0:
                    self._save(state)
                self.hook.on_phase("in a step", state.step + 1)
                self.hook.on_step_begin(state.step + 1)
                state = self._step(state, batches)
        return state

    def _is_asked_to_stop(self) -> bool:
        """Whether a rank was asked to stop. Collective."""
        if self._stop_reason is None:
            self._stop_reason = self._stop_requested()
            if self._stop_reason is not None:
                self.hook.on_stop_requested(self._stop_reason)
        return self._stop_reason is not None

    def _validation_is_due(self, state: TrainState) -> bool:
        """Whether this step is to be validated and was not yet: a run may have been stopped in between."""
        interval, is_last = self.config.evaluation.interval_steps, state.step == self.config.training.train_steps
        is_due = interval > 0 and (state.step % interval == 0 or is_last)
        return is_due and state.validated_step != state.step and self.batches.validation is not None

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
        """Validate, unless the run is asked to stop meanwhile."""
        begin = time.monotonic()
        self.engine.set_global_batch_size(self.config.batch.global_batch_size)
        result = self._validate(state.step)
        if result is None:
            return state
        mlm = 0.0 if math.isnan(result.mlm_loss) else self.config.objective.mlm_weight * result.mlm_loss
        loss = result.lm_loss + mlm
        seconds = time.monotonic() - begin
        self.hook.on_evaluate(
            EvaluationReport(state.step, loss, result.lm_loss, result.mlm_loss, result.num_tokens, seconds)
        )
        self._validation_loss = loss
        best = loss if state.best_validation_loss is None else min(loss, state.best_validation_loss)
        best = best if math.isfinite(best) else state.best_validation_loss
        return replace(state, best_validation_loss=best, validated_step=state.step)

    def _validate(self, step: int) -> EvaluationResult | None:
        """Return the losses over all validation batches; None where the run is asked to stop before the last."""
        assert self.batches.validation is not None
        results = []
        with self.batches.validation(0) as batches:  # from the first sample: the same ones every time
            for _ in range(self.config.evaluation.num_batches):
                self.hook.on_phase("validating", step)
                if self._is_asked_to_stop():
                    return None
                results.append(self.engine.evaluate(batches, self.engine.num_micro_batches))
        return pooled(results)

    def _save(self, state: TrainState, *, asynchronous: bool | None = None) -> None:
        self.hook.on_phase("saving", state.step)
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

    def _save_for_good(self, state: TrainState) -> None:
        """Save before the run ends; here a save that fails is an error, since no later one makes up for it."""
        self._save(state, asynchronous=False)
        error = self._settle()
        if error is not None:
            raise error

    def _settle(self) -> CheckpointError | None:
        """Wait for the save in progress, and tell the hooks of it if it succeeded; return its error."""
        error = self.store.wait()
        if self._saving is not None and error is None:
            self.hook.on_checkpoint(*self._saving)
        elif error is not None:
            self._saved_step = -1
        self._saving = None
        return error
