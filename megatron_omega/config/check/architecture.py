"""Contradictions of the model, and of what it is asked to learn."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_omega.config.check.words import one_of
from megatron_omega.config.schema import LEGAL_BRANCHES, Branch, ModelConfig, RunConfig, Stack


def architecture(model: ModelConfig) -> Iterator[str]:
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield (
            f"model.hidden_size={model.hidden_size} is not divisible by model.num_attention_heads="
            f"{model.num_attention_heads}; change one of them or give model.head_dim"
        )
    elif model.resolved_head_dim % 2:
        origin = "" if model.head_dim else " (model.hidden_size / model.num_attention_heads)"
        even = model.resolved_head_dim + 1
        yield f"model.head_dim={model.resolved_head_dim}{origin} is odd; rotary pairs need an even one, such as {even}"
    if model.positions == "sinusoidal" and model.hidden_size % 2:
        yield f"model.hidden_size={model.hidden_size} is odd; model.positions=sinusoidal needs sine and cosine pairs"
    if not model.is_decoder_only:
        yield from _branches(model, "encoder")
    yield from _branches(model, "decoder")


def _branches(model: ModelConfig, stack: Stack) -> Iterator[str]:
    legal = LEGAL_BRANCHES[stack]
    name, pattern = f"model.{stack}_branches", model.branch_pattern(stack)
    for index, branches in enumerate(pattern):
        place = name if len(pattern) == 1 else f"{name}[{index}]"
        shown = f"{place}=[{', '.join(branches)}]"
        if not branches:
            yield f"{place} is empty; name at least one of {one_of(legal)}"
        for branch in sorted({*branches} - {*legal}):
            yield f"{shown} has {branch}, which no {stack} can use; use {one_of(legal)}"
        for branch in sorted({branch for branch in branches if branches.count(branch) > 1}):
            yield f"{shown} names {branch} more than once; name each branch once"
    if {"local", "axial"} <= branches_used(model, stack) and model.local_window < model.axial_width:
        yield (
            f"model.local_window={model.local_window} is smaller than model.axial_width={model.axial_width} "
            f"(in {name}): parts of the text would never be seen; use a window of at least {model.axial_width}"
        )


def objective(config: RunConfig) -> Iterator[str]:
    objective = config.objective
    weights = (objective.prefix_lm, objective.span_corruption, objective.masked_prefix, objective.in_context)
    if not config.model.is_decoder_only and sum(weights) == 0:
        yield (
            "objective.prefix_lm=0, objective.span_corruption=0 and objective.masked_prefix=0 leave nothing to train; "
            "give at least one a positive weight"
        )
    if objective.span_corruption and not 0 < objective.span_rate < 1:
        yield f"objective.span_rate={objective.span_rate:g} is not between 0 and 1; or use objective.span_corruption=0"
    if objective.span_corruption and objective.span_mean_length < 1:
        yield f"objective.span_mean_length={objective.span_mean_length:g} is less than a token; use at least 1"
    if objective.masked_prefix and config.model.has_mlm_head and objective.mask_rate == 0:
        yield "objective.mask_rate=0 masks nothing; use a positive rate, or objective.masked_prefix=0"


def branches_used(model: ModelConfig, stack: Stack) -> set[Branch]:
    """Return the branches of all layers of `stack`."""
    return {branch for branches in model.branch_pattern(stack) for branch in branches}
