"""The training loop as a story: start or resume, step, validate, save, end. Everything else is a hook.

Knows the engine, the checkpoint store and where batches come from; knows nothing of models, corpora or displays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.results import EvaluationResult, MicroBatch, StepResult, pooled
from megatron_omega.errors import CheckpointError, OmegaError, Preempted
from megatron_omega.log import get_logger
from megatron_omega.training.batch_size import Interval, samples_of_step, with_interval
from megatron_omega.training.hooks import Hook
from megatron_omega.training.learning_rate import learning_rate_fraction
from megatron_omega.training.spikes import judge, remember
from megatron_omega.training.state import (
    BadStep,
    EvaluationReport,
    Fault,
    Rollback,
    RunContext,
    StepReport,
    TrainState,
)
from megatron_omega.training.validation import is_stalled, objective_of, score_of, validated

log = get_logger(__name__)

StopRequested = Callable[[], str | None]
"""Why the run is to stop now, the same on all ranks, or None. Collective."""
OpenBatches = Callable[[int, Sequence[Interval]], AbstractContextManager[Iterator[MicroBatch]]]
"""From a number of consumed samples, and those left out, to this replica's micro-batches from there on."""


Answer = Callable[[Callable[[], None]], Mapping[str, float]]
"""What answers to held-out prompts are worth, by task and metric, the same on all ranks; tells its argument that it is
alive. Collective."""


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
    def roll_back(self, engine: Any, up_to_step: int) -> Any: ...
    def load(self, engine: Any, path: Path | str, weights_only: bool = False) -> Any: ...


class WeightCheck(Protocol):
    """What the loop asks of the one that compares weights."""

    interval_steps: int

    def find_fault(self) -> Fault | None:
        """Return what differs between ranks since the last call: the same answer on all of them. Collective."""
        ...

    def forget(self) -> None:
        """Begin anew: the weights have been replaced."""
        ...


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
        weight_check: WeightCheck | None = None,
        answer: Answer | None = None,
        part_with: Callable[[Fault], None] = lambda _: None,
    ) -> None:
        """`flops_per_sample`: of forward and backward; `peak_flops`: of all devices together, FLOP/s.

        `weight_check` compares weights between ranks; None where there is nothing to compare, or it is not wanted.
        `part_with` is told of a fault that it found; where a host can be exchanged it raises instead of going back.
        `answer` belongs to a validation if it is there.
        """
        self.config = config
        self.engine = engine
        self.store = store
        self.batches = batches
        self.hook = hook
        self.weight_check = weight_check
        self._answer = answer
        self._part_with = part_with
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
            if not self._is_complete(state):
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
        saved = self.store.load_latest(self.engine) if checkpoint.resume else None
        if saved is None and checkpoint.load is not None and not self.config.lora.is_on:  # a base is there by now
            weights_only = checkpoint.load_weights_only
            saved = self.store.load(self.engine, checkpoint.load, weights_only=weights_only)
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
        while True:
            self.hook.on_phase("opening the corpus", state.step)
            with self.batches.train(state.consumed_samples, state.left_out) as batches:
                state, is_done = self._train_on(state, batches)
            if is_done:
                return state

    def _train_on(self, state: TrainState, batches: Iterator[MicroBatch]) -> tuple[TrainState, bool]:
        """Do steps until all are done, or until the run has gone back and needs the batches of another place."""
        total, checkpoint = self.config.training.train_steps, self.config.checkpoint
        while not self._is_asked_to_stop():
            if self._validation_is_due(state):
                state = self._evaluate(state)
                if self._stop_reason is not None:
                    break
            if state.step >= total or self._ends_early(state):
                break
            is_due = checkpoint.interval_steps and state.step and state.step % checkpoint.interval_steps == 0
            if is_due and not state.bad_steps:  # what bad steps may have led to is not kept
                self._save(state)
            self.hook.on_phase("in a step", state.step + 1)
            self.hook.on_step_begin(state.step + 1)
            state = self._step(state, batches)
            returned = self._return_from_trouble(state)
            if returned is not None:
                return returned, False
        return state, True

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

    def _ends_early(self, state: TrainState) -> bool:
        return is_stalled(state, self.config.evaluation.patience)

    def _is_complete(self, state: TrainState) -> bool:
        is_through = state.step >= self.config.training.train_steps and not self._validation_is_due(state)
        return is_through or self._ends_early(state)

    def _step(self, state: TrainState, batches: Iterator[MicroBatch]) -> TrainState:
        config, begin = self.config, time.monotonic()
        pieces = samples_of_step(config.batch, state.consumed_samples, state.left_out)
        samples = sum(map(len, pieces))
        self.engine.set_global_batch_size(samples)
        fraction = learning_rate_fraction(config.schedule, state.step, config.training.train_steps)
        learning_rate = config.optimizer.learning_rate * fraction
        recent, resilience = state.recent_losses, config.resilience
        result = self.engine.train_step(
            batches,
            learning_rate=learning_rate,
            accept=(lambda loss: judge(loss, recent, resilience)[0]) if resilience.spike_z_score else None,
        )
        seconds = time.monotonic() - begin
        state = replace(
            state,
            step=state.step + 1,
            consumed_samples=pieces[-1].stop,
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
        return self._judge(state, result, pieces)

    def _judge(self, state: TrainState, result: StepResult, pieces: Sequence[range]) -> TrainState:
        """Return the state with the verdict on its last step: another loss to measure by, or one bad step more."""
        resilience = self.config.resilience
        is_acceptable, score = judge(result.lm_loss, state.recent_losses, resilience)
        if not result.skipped:
            return replace(state, bad_steps=0, recent_losses=remember(result.lm_loss, state.recent_losses, resilience))
        if is_acceptable and self.config.precision.dtype == "fp16":
            return state  # an overflow: the loss scale is being searched for
        since = state.bad_since if state.bad_steps else pieces[0].start
        state = replace(state, bad_steps=state.bad_steps + 1, bad_since=since)
        samples = tuple((piece.start, piece.stop) for piece in pieces)
        cause = "gradient not finite" if is_acceptable else "loss spike"
        cause = cause if math.isfinite(result.loss) else "loss not finite"
        self.hook.on_bad_step(
            BadStep(state.step, cause, result.loss, result.lm_loss, score, result.grad_norm, state.bad_steps, samples)
        )
        return state

    def _return_from_trouble(self, state: TrainState) -> TrainState | None:
        """Go back where too many steps in a row were bad, or where weights differ; None: go on. Collective."""
        if state.bad_steps >= self.config.resilience.spike_limit:
            reason = f"{state.bad_steps} bad steps in a row, up to step {state.step}"
            return self._roll_back(state, reason, window=(state.bad_since, state.consumed_samples))
        saves = self.config.checkpoint.interval_steps
        is_due = state.step == self.config.training.train_steps or (saves > 0 and state.step % saves == 0)
        if self.weight_check is None or not (is_due or state.step % self.weight_check.interval_steps == 0):
            return None
        fault = self._find_fault()
        if fault is not None:
            self._settle()
            self._part_with(fault)
        return None if fault is None else self._roll_back(state, f"after step {state.step}: {fault.message}")

    def _find_fault(self) -> Fault | None:
        """Compare the weights that were used since the last time: at an interval, and before every save. Collective."""
        fault = None if self.weight_check is None else self.weight_check.find_fault()
        if fault is not None:
            self.hook.on_fault(fault)
        return fault

    def _roll_back(self, state: TrainState, reason: str, window: Interval | None = None) -> TrainState:
        """Return to the last good checkpoint, and leave the samples of `window` out from there on. Collective.

        Refused steps changed nothing, so without a checkpoint they are left behind all the same.
        """
        limit = self.config.resilience.max_rollbacks
        if state.rollbacks >= limit:
            raise OmegaError(
                f"{reason}; the run has gone back {state.rollbacks} times and resilience.max_rollbacks={limit}: look "
                "in events.jsonl for the documents or the ranks, then start again with other data, a lower "
                "optimizer.learning_rate or another machine"
            )
        self.hook.on_phase("going back to a checkpoint", state.step)
        self._settle()
        saved = self.store.roll_back(self.engine, up_to_step=state.step - state.bad_steps)
        if saved is not None:
            back = TrainState.from_json(saved)
            left_out = state.left_out if window is None else with_interval(state.left_out, window)
            back = replace(back, left_out=left_out)
            self._saved_step = back.step
        elif window is not None:
            back = replace(state, bad_steps=0)
        else:
            raise OmegaError(f"{reason}; there is no checkpoint to go back to: start again, from the initial weights")
        back = replace(back, rollbacks=state.rollbacks + 1)
        if self.weight_check is not None:
            self.weight_check.forget()
        self.hook.on_rollback(Rollback(reason, state.step, back.step, back.rollbacks, back))
        return back

    def _evaluate(self, state: TrainState) -> TrainState:
        """Validate, unless the run is asked to stop meanwhile."""
        begin = time.monotonic()
        self.engine.set_global_batch_size(self.config.batch.global_batch_size)
        result = self._validate(state.step)
        if result is None:
            return state
        loss = objective_of(result, self.config.objective)
        answers = {} if self._answer is None else self._answer(lambda: self.hook.on_phase("answering", state.step))
        score, seconds = score_of(answers), time.monotonic() - begin
        losses = (loss, result.lm_loss, result.mlm_loss)
        self.hook.on_evaluate(EvaluationReport(state.step, *losses, result.num_tokens, seconds, score, answers))
        self._validation_loss = loss if math.isfinite(loss) else None  # a manifest is JSON, which has no NaN
        state = validated(state, loss, score)
        if self._ends_early(state):
            log.info("%d validations were no better than that of step %d", state.fruitless_validations, state.best_step)
        return state

    def _validate(self, step: int) -> EvaluationResult | None:
        """Return the losses over all validation batches; None where the run is asked to stop before the last."""
        assert self.batches.validation is not None
        results = []
        self.hook.on_phase("opening the validation corpus", step)
        with self.batches.validation(0, ()) as batches:  # from the first sample: the same ones every time
            for _ in range(self.config.evaluation.num_batches):
                self.hook.on_phase("validating", step)
                if self._is_asked_to_stop():
                    return None
                results.append(self.engine.evaluate(batches, self.engine.num_micro_batches))
            self.hook.on_phase("closing the validation corpus", step)
        return pooled(results)

    def _save(self, state: TrainState, *, asynchronous: bool | None = None) -> None:
        begin = time.monotonic()
        self.hook.on_phase("saving", state.step)
        self._settle()
        if self._saved_step == state.step:
            return
        self.store.save(
            self.engine,
            state.to_json(),
            step=state.step,
            asynchronous=asynchronous,
            validation_loss=self._validation_loss if state.validated_step == state.step else None,
        )
        self._saved_step = state.step
        self._saving = (self.store.directory / f"step-{state.step:08d}", state.step)
        self.hook.on_save(state.step, time.monotonic() - begin)

    def _save_for_good(self, state: TrainState) -> None:
        """Save before the run ends; here a save that fails is an error, since no later one makes up for it."""
        if self._find_fault() is not None:  # stopped between two comparisons: the last good checkpoint stays the last
            self._settle()
            return
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
