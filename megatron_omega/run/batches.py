"""This replica's stream of micro-batches, from any place in the data on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_omega.config.schema import RunConfig
from megatron_omega.data.batch import Batch
from megatron_omega.data.loader import Loader, micro_batch_indices
from megatron_omega.data.sources import Source
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.results import MicroBatch
from megatron_omega.training.batch_size import Interval, samples_of_step
from megatron_omega.training.loop import OpenBatches


def open_batches(config: RunConfig, source: Source | None, engine: Engine) -> OpenBatches:
    """Return a function that opens this replica's stream of micro-batches at a place in the data.

    `source` is None on ranks that read none.
    """
    data, batch = engine.topology.data, config.batch

    @contextmanager
    def open_at(consumed_samples: int, left_out: Sequence[Interval]) -> Iterator[Iterator[MicroBatch]]:
        if not engine.reads_data:
            yield iter(())
            return
        assert source is not None, "a rank that reads data has opened it"
        indices = micro_batch_indices(
            consumed_samples,
            lambda consumed: samples_of_step(batch, consumed, left_out),
            batch.micro_batch_size,
            data.rank,
            data.size,
        )
        with Loader(source, indices, config.data.num_workers, config.data.prefetch_batches) as loader:
            yield (to_micro_batch(found) for found in loader)

    return open_at


def to_micro_batch(batch: Batch) -> MicroBatch:
    """Turn a batch of arrays into the tensors the model takes."""
    decoder = (torch.from_numpy(batch.decoder_ids), torch.from_numpy(batch.decoder_segments))
    encoder = (torch.from_numpy(batch.encoder_ids), torch.from_numpy(batch.encoder_segments))
    inputs = (*encoder, *decoder) if batch.encoder_ids.shape[1] else decoder
    return MicroBatch(inputs, (torch.from_numpy(batch.lm_labels), torch.from_numpy(batch.mlm_labels)), batch.num_tokens)
