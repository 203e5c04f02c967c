"""What the engine takes and gives: micro-batches, the result of a step, the result of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_omega.config.labels import IGNORED_LABEL

Accept = Callable[[float], bool]
"""From the LM loss of a global batch to whether the step may be taken. Pure: ranks ask it apart and must agree."""


@dataclass(frozen=True)
class MicroBatch:
    """What one replica computes at a time."""

    inputs: tuple[Tensor, ...]
    """What the first layer takes."""
    labels: tuple[Tensor, Tensor]
    """LM and MLM labels; `IGNORED_LABEL` if there is nothing to predict."""
    num_tokens: int = 0
    """Tokens that are not padding."""

    @property
    def masked_rows(self) -> Tensor:
        """Places of the MLM labels among all tokens of the encoder's side: found here, before the device has them."""
        return (self.labels[1] != IGNORED_LABEL).flatten().nonzero().flatten()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    lm_loss: float
    mlm_loss: float
    grad_norm: float
    """Global gradient norm before clipping; not finite where the step was skipped."""
    skipped: bool
    num_tokens: int
    """Tokens of the global batch that are not padding; 0 on ranks that read no data."""


@dataclass(frozen=True)
class EvaluationResult:
    """Mean losses per token over everything evaluated."""

    lm_loss: float
    mlm_loss: float
    """NaN if there was no masked token."""
    num_tokens: int
    """Tokens that the LM loss was averaged over."""
    num_masked_tokens: int = 0
    """Tokens that the MLM loss was averaged over."""


def pooled(results: Sequence[EvaluationResult]) -> EvaluationResult:
    """Return the losses over the tokens of all `results` together."""

    def mean(losses: Sequence[float], counts: Sequence[int]) -> float:
        total = sum(loss * count for loss, count in zip(losses, counts, strict=True) if count)
        return total / sum(counts) if sum(counts) else math.nan

    tokens, masked = [r.num_tokens for r in results], [r.num_masked_tokens for r in results]
    lm, mlm = mean([r.lm_loss for r in results], tokens), mean([r.mlm_loss for r in results], masked)
    return EvaluationResult(lm, mlm, sum(tokens), sum(masked))
