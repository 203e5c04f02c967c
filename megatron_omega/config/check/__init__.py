"""Contradictions between settings: every one of them, each in one sentence. Pure functions of a valid `RunConfig`.

A finding says what was found, what is needed and what to do. `notices` are legal but unwise. Nothing is read from disk.
One file a subject: a new setting's sentence goes where its section's are.
"""

from __future__ import annotations

from megatron_omega.config.check.architecture import architecture, objective
from megatron_omega.config.check.data import corpus, streams, tasks
from megatron_omega.config.check.layout import stages, tensor_parallel, zero
from megatron_omega.config.check.sizes import ends, sizes
from megatron_omega.config.check.training import adapters, batches, checkpoints, schedule, traces
from megatron_omega.config.check.unwise import unwise
from megatron_omega.config.check.words import divisors, one_of
from megatron_omega.config.schema import RunConfig

__all__ = ["divisors", "findings", "notices", "one_of"]


def findings(
    config: RunConfig,
    world_size: int | None,
    zero_stage: int | None,
    *,
    needs_corpus: bool = True,
    needs_training_text: bool = True,
) -> list[str]:
    """Return every contradiction in `config`.

    Args:
        world_size: processes of the run; None leaves out what depends on it.
        zero_stage: the ZeRO stage that will run; None leaves out what depends on it.
        needs_corpus: whether a run without any corpus is a contradiction (a training run is, a tool's is not).
        needs_training_text: whether a corpus without a train part is one (an evaluation's is not).
    """
    found = [*architecture(config.model), *streams(config), *objective(config), *tensor_parallel(config)]
    found += [*stages(config), *schedule(config), *checkpoints(config), *tasks(config), *adapters(config)]
    if zero_stage is not None:
        found += zero(config, zero_stage)
    found += [*batches(config, world_size), *traces(config, world_size)]
    if needs_corpus:
        found += corpus(config, needs_training_text=needs_training_text)
        found += sizes(config) if needs_training_text else ()
    return found


def notices(config: RunConfig) -> list[str]:
    """Return what is legal but probably not meant."""
    return [*unwise(config), *ends(config)]
