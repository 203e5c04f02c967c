"""Values of a training run: where it stands, and what a step, a validation and a start have to tell.

Plain frozen data. No tensors, no engine: hooks, checkpoints and tools read these without importing either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import CheckpointError

Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; all that a checkpoint needs besides weights, optimizer and loss scale."""

    step: Count = 0
    """Optimizer steps done, skipped ones included."""
    consumed_samples: Count = 0
    """Samples drawn or passed over so far: the position in the data."""
    consumed_tokens: Count = 0
    """Non-padding tokens of both streams so far."""
    skipped_steps: Count = 0
    """Steps that changed nothing, because a gradient was not finite."""
    best_validation_loss: float | None = None
    """Lowest validation loss so far."""
    validated_step: Annotated[int, Field(ge=-1)] = -1
    """Step of the last validation; -1 before the first."""
    score: float | None = None
    """What the answers of the last validation are worth; None if there were none."""
    best_score: float | None = None
    """Highest such score so far."""
    best_step: Annotated[int, Field(ge=-1)] = -1
    """Step of the best validation, by its score, else by its loss; -1 before the first."""
    fruitless_validations: Count = 0
    """Validations since then, none of them better."""
    recent_losses: tuple[float, ...] = ()
    """LM losses of the last accepted steps: what the next one is judged by."""
    bad_steps: Count = 0
    """Bad steps in a row, up to here."""
    bad_since: Count = 0
    """First sample of the first of them."""
    rollbacks: Count = 0
    """How often the run went back to a checkpoint of its own accord."""
    left_out: tuple[tuple[Count, Count], ...] = ()
    """Samples [start, stop) that the run passes over."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a manifest."""
        values = asdict(self)
        return values | {
            "recent_losses": list(self.recent_losses),
            "left_out": [list(interval) for interval in self.left_out],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        """Read what `to_json` returned; names this version does not know are left out.

        Raises CheckpointError if a value is of another type or below what it counts from.
        """
        known = {each.name for each in fields(cls)}
        found = {name: value for name, value in values.items() if name in known}
        try:
            return TypeAdapter(cls).validate_json(json.dumps(found), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"the training state of the checkpoint is damaged ({place}: {first['msg']}); use another checkpoint"
            ) from None


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. Not-a-number stands if there was nothing to measure (mlm_loss without masked tokens)."""

    step: int
    """Number of this step; the first is 1."""
    loss: float
    """Objective: the LM and the MLM loss, weighted as objective.mlm_weighing says, and z-losses."""
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
class BadStep:
    """A step that was skipped: its loss or a gradient was not finite, or its loss far above the others'."""

    step: int
    cause: Literal["loss spike", "loss not finite", "gradient not finite"]
    loss: float
    lm_loss: float
    z_score: float
    """Robust standard deviations of lm_loss above the median of the last accepted ones; NaN without enough."""
    grad_norm: float
    in_a_row: int
    """Bad steps up to this one."""
    samples: tuple[tuple[int, int], ...]
    """Sample numbers [start, stop) of its batch."""


@dataclass(frozen=True)
class Rollback:
    """The run goes back to its last good checkpoint."""

    reason: str
    from_step: int
    """Last step done before."""
    to_step: int
    """Step of the checkpoint; the same as `from_step` if there is none, and only the data are passed over."""
    number: int
    """The first of the run is 1."""
    state: TrainState
    """Where the run stands now."""


@dataclass(frozen=True)
class Fault:
    """Something is wrong with a rank or its machine."""

    kind: Literal["silent_fault", "straggler"]
    message: str
    """One sentence."""
    ranks: tuple[int, ...]
    """Who is named."""
    details: Mapping[str, Any]


@dataclass(frozen=True)
class EvaluationReport:
    """One validation."""

    step: int
    """Steps done when it ran; 0 is before the first."""
    loss: float
    """The LM and the MLM loss, weighted as objective.mlm_weighing says."""
    lm_loss: float
    """Cross-entropy of the decoder per target token, nats."""
    mlm_loss: float
    """Cross-entropy of the masked tokens per masked token, nats; NaN without any."""
    num_tokens: int = 0
    """Tokens the loss was averaged over."""
    seconds: float = 0.0
    """Wall time, seconds."""
    score: float | None = None
    """Mean of `answers`; None without any."""
    answers: Mapping[str, float] = field(default_factory=dict)
    """By task and metric, what generated answers to held-out prompts are worth."""


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
