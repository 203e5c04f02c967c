"""Values of a training run: where it stands, and what a step, a validation and a start have to tell.

Plain frozen data. No tensors, no engine: hooks, checkpoints and tools read these without importing either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_omega.config.schema import RunConfig


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; all that a checkpoint needs besides weights, optimizer and loss scale."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: int = 0
    """Samples drawn so far: the position in the data."""
    consumed_tokens: int = 0
    """Non-padding tokens of both streams so far."""
    skipped_steps: int = 0
    """Steps that changed nothing, because a gradient was not finite."""
    best_validation_loss: float | None = None
    """Lowest validation loss so far."""
    validated_step: int = -1
    """Step of the last validation; -1 before the first."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        """Read what `to_json` returned; names this version does not know are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Not-a-number stands where there was nothing to measure (mlm_loss without masked tokens)."""

    step: int
    """Number of this step; the first is 1."""
    loss: float
    """Objective: lm_loss + mlm_weight x mlm_loss + z-losses."""
    lm_loss: float
    """Cross-entropy of the decoder per target token, nats."""
    mlm_loss: float
    """Cross-entropy of the masked tokens per masked token, nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    """Scheduled learning rate at width_base."""
    consumed_samples: int
    """Samples drawn up to the end of this step."""
    consumed_tokens: int
    """Non-padding tokens of both streams up to the end of this step."""
    tokens_per_second: float
    """Non-padding tokens of both streams per second of this step, over all ranks."""
    step_seconds: float
    """Wall time of this step, seconds."""
    mfu: float
    """Model FLOP/s over peak FLOP/s of all devices, 0 to 1."""
    skipped: bool
    """Whether the step changed nothing."""


@dataclass(frozen=True)
class EvaluationReport:
    """One validation."""

    step: int
    """Steps done when it ran; 0 is before the first."""
    loss: float
    """lm_loss + mlm_weight x mlm_loss."""
    lm_loss: float
    """Cross-entropy of the decoder per target token, nats."""
    mlm_loss: float
    """Cross-entropy of the masked tokens per masked token, nats; not a number without any."""
    num_tokens: int = 0
    """Tokens the loss was averaged over."""
    seconds: float = 0.0
    """Wall time, seconds."""


@dataclass(frozen=True)
class RunContext:
    """What hooks learn when a run starts."""

    config: RunConfig
    """The resolved configuration."""
    run_directory: Path
    """Folder of everything this run writes; exists."""
    state: TrainState
    """Where the run starts: step 0, or the step of the checkpoint it resumed from."""
    is_main: bool = True
    """Whether this is rank 0, the one that writes."""
    details: Mapping[str, Any] | None = None
    """Anything else worth a line in events.jsonl: layout, parameters, versions, choices of kernels."""
