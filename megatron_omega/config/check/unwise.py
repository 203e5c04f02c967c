"""What is legal but probably not meant."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_omega.config.check.architecture import branches_used
from megatron_omega.config.schema import RunConfig, Stack


def unwise(config: RunConfig) -> Iterator[str]:
    model, objective = config.model, config.objective
    if "axial" in (decoder := branches_used(model, "decoder")) and not {"causal", "local"} & decoder:
        yield "model.decoder_branches has axial alone: no position can see all of its past; add local or causal"
    stacks: tuple[tuple[Stack, int], ...] = (("encoder", model.encoder_layers), ("decoder", model.decoder_layers))
    for stack, layers in stacks:
        if 0 < layers < (lists := len(model.branch_pattern(stack))):
            yield f"model.{stack}_branches has {lists} lists for {layers} layers; only the first {layers} are used"
    if not model.is_decoder_only and objective.masked_prefix and objective.mlm_weight and not model.mlm_head:
        yield "objective.masked_prefix masks tokens that nothing predicts, since model.mlm_head=false"
    if model.has_mlm_head and objective.mlm_weight and not objective.masked_prefix:
        yield "model.mlm_head=true is never trained, since objective.masked_prefix=0"
    if config.lora.is_on:
        yield (
            f"lora.rank={config.lora.rank}: estimates are of training the whole model; with adapters the memory of "
            "gradients, masters and moments is a small part of what they say"
        )
