"""What a validation says of a run: its objective, whether it is the best so far, and whether others were in vain.

Pure functions, so that a resumed run agrees. Answers count before losses: they are what a task is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from megatron_omega.config.schema import ObjectiveConfig
from megatron_omega.engine.results import EvaluationResult
from megatron_omega.training.state import TrainState


def objective_of(result: EvaluationResult, objective: ObjectiveConfig) -> float:
    """Return what training minimises, of a validation: the LM loss and the weighted MLM loss."""
    if math.isnan(result.mlm_loss):
        return result.lm_loss
    is_by_labels = objective.mlm_weighing == "labels"
    share = result.num_masked_tokens / result.num_tokens if is_by_labels else 1.0
    return result.lm_loss + objective.mlm_weight * share * result.mlm_loss


def score_of(answers: Mapping[str, float]) -> float | None:
    """Return the mean over tasks; None without any."""
    return sum(answers.values()) / len(answers) if answers else None


def validated(state: TrainState, loss: float, score: float | None) -> TrainState:
    """Return the state after a validation with this loss and score."""
    is_better = _is_better(state, loss, score)
    lowest = [value for value in (state.best_validation_loss, loss) if value is not None and math.isfinite(value)]
    scores = [value for value in (state.best_score, score) if value is not None]
    return replace(
        state,
        best_validation_loss=min(lowest, default=None),
        validated_step=state.step,
        score=score,
        best_score=max(scores, default=None),
        best_step=state.step if is_better else state.best_step,
        fruitless_validations=0 if is_better else state.fruitless_validations + 1,
    )


def _is_better(state: TrainState, loss: float, score: float | None) -> bool:
    if score is not None and state.best_score is not None and score != state.best_score:
        return score > state.best_score
    if not math.isfinite(loss):
        return False
    return state.best_validation_loss is None or loss < state.best_validation_loss or state.best_step < 0


def is_stalled(state: TrainState, patience: int) -> bool:
    """Tell whether so many validations in a row were in vain that the run ends."""
    return 0 < patience <= state.fruitless_validations
