"""Engine counters that a checkpoint carries. They do not depend on the layout."""

from __future__ import annotations

from typing import Any

from megatron_omega.checkpoint.manifest import EngineState
from megatron_omega.engine.internals import loss_scaler_state, set_loss_scaler_state


def read_counters(engine: Any) -> EngineState:
    """Return the counters of a DeepSpeed engine."""
    return EngineState(
        global_steps=engine.global_steps,
        global_samples=engine.global_samples,
        skipped_steps=engine.skipped_steps,
        loss_scaler=loss_scaler_state(engine.optimizer),
    )


def restore_counters(engine: Any, saved: EngineState) -> None:
    """Set the counters of a DeepSpeed engine."""
    engine.global_steps = saved.global_steps
    engine.global_samples = saved.global_samples
    engine.skipped_steps = saved.skipped_steps
    engine.micro_steps = 0  # a step ends where this is a multiple of the accumulation: of any, as a ramp-up changes it
    set_loss_scaler_state(engine.optimizer, saved.loss_scaler)
