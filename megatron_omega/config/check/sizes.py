"""Sizes that say nothing beside another: a reach beyond the text, a bound above what it bounds, a start after the end.

Asked of a run that trains. A tool may read a model with shorter texts than it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_omega.config.check.architecture import branches_used
from megatron_omega.config.schema import Branch, RunConfig, Stack


def sizes(config: RunConfig) -> Iterator[str]:
    """Yield a finding for each size that reaches beyond what another allows."""
    model, objective, data = config.model, config.objective, config.data
    if (longest := _longest(config, "local")) and model.local_window > longest:
        yield (
            f"model.local_window={model.local_window} reaches beyond the {longest} tokens of a text "
            f"(data.encoder_seq_length, data.decoder_seq_length); use at most {longest}"
        )
    blocks = _longest(config, "select") // model.axial_width
    if blocks and model.select_blocks >= blocks:
        yield (
            f"model.select_blocks={model.select_blocks} with model.axial_width={model.axial_width} leaves nothing out "
            f"of data.decoder_seq_length={data.decoder_seq_length}; "
            + (f"use at most {blocks - 1}" if blocks > 1 else "use a longer sequence, or the causal branch")
        )
    if not model.is_decoder_only:
        if data.decoder_seq_length <= model.resolved_overlap:
            yield (
                f"model.decoder_overlap={model.decoder_overlap} leaves no room for an answer in "
                f"data.decoder_seq_length={data.decoder_seq_length}; use less than that"
            )
        most = min(data.encoder_seq_length, data.decoder_seq_length)
        if most and objective.span_corruption and objective.span_mean_length > most:
            yield (
                f"objective.span_mean_length={objective.span_mean_length:g} is longer than a text of {most} tokens "
                f"(data.encoder_seq_length, data.decoder_seq_length); use at most {most}"
            )
        if objective.masked_prefix and data.encoder_seq_length and objective.mask_span_length > data.encoder_seq_length:
            yield (
                f"objective.mask_span_length={objective.mask_span_length:g} is longer than data.encoder_seq_length="
                f"{data.encoder_seq_length}; use at most {data.encoder_seq_length}"
            )
    precision = config.precision
    if precision.dtype == "fp16" and precision.min_loss_scale > 2.0**precision.initial_loss_scale_power:
        yield (
            f"precision.min_loss_scale={precision.min_loss_scale:g} is above the first loss scale, 2 to "
            f"precision.initial_loss_scale_power={precision.initial_loss_scale_power}; use at most "
            f"{2.0**precision.initial_loss_scale_power:g}"
        )


def ends(config: RunConfig) -> Iterator[str]:
    """Yield a notice for each thing that would begin after the last sample of the run, or be over after it only."""
    most = config.training.train_steps * config.batch.global_batch_size
    ramp = config.batch.ramp_up
    if ramp is not None and ramp.samples >= most:
        yield (
            f"batch.ramp_up.samples={ramp.samples} is no less than all samples of the run (at most {most}): the batch "
            "never reaches batch.global_batch_size"
        )
    late = [f"data.corpora[{place}]" for place, corpus in enumerate(config.data.corpora) if corpus.from_sample >= most]
    late += [f"data.reweight[{place}]" for place, entry in enumerate(config.data.reweight) if entry.from_sample >= most]
    yield from (f"{name}.from_sample lies behind all {most} samples of the run: it does nothing" for name in late)


def _longest(config: RunConfig, branch: Branch) -> int:
    """Return the longest stream that a branch sees; 0 if no layer has the branch."""
    lengths: dict[Stack, int] = {"decoder": config.data.decoder_seq_length}
    if not config.model.is_decoder_only:
        lengths["encoder"] = config.data.encoder_seq_length
    return max((length for stack, length in lengths.items() if branch in branches_used(config.model, stack)), default=0)
