"""The small model and made-up batches of `megatron_omega.studies.made_up`, under the name that tests use."""

from megatron_omega.studies.made_up import (
    DECODER,
    ENCODER,
    WIDTH,
    micro_batch,
    replica_batches,
    small_config,
    start_engine,
    train_losses,
)

__all__ = [
    "DECODER",
    "ENCODER",
    "WIDTH",
    "micro_batch",
    "replica_batches",
    "small_config",
    "start_engine",
    "train_losses",
]
