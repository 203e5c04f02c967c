"""A small Omega with every branch, and an endless made-up corpus for it: for proofs that need no text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import layout_of
from megatron_omega.config.schema import RunConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.results import MicroBatch
from megatron_omega.engine.start import start_distributed
from megatron_omega.model.kernels import select_kernels
from megatron_omega.parallel.topology import create_topology
from megatron_omega.run.construction import build_engine

ENCODER, DECODER, WIDTH = 48, 32, 8


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """Return a small Omega with every branch; `sections` override fields."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6, "encoder_layers": 2,
            "decoder_layers": 2, "vocab_size": 250, "local_window": 16, "axial_width": WIDTH,
        },
        "data": {"encoder_seq_length": ENCODER, "decoder_seq_length": DECODER},
        "parallel": {"recompute": "none"},
        "precision": {"dtype": "fp32"},
        "batch": {"micro_batch_size": 2, "global_batch_size": 16},
        "optimizer": {"gradient_clipping": 0.5, "learning_rate": 1e-2},
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return RunConfig.model_validate(values)


def few(**sections: dict[str, Any]) -> RunConfig:
    """Return the same with few samples a step, for whatever is slow."""
    return small_config(batch={"micro_batch_size": 2, "global_batch_size": 8}, **sections)


def micro_batch(sample: int, count: int, config: RunConfig) -> MicroBatch:
    """Return samples `sample` .. `sample + count` of the corpus."""
    rows = [_sample(index, config) for index in range(sample, sample + count)]
    encoder_ids, encoder_segments, decoder_ids, decoder_segments, lm, mlm = (
        torch.stack(part) for part in zip(*rows, strict=True)
    )
    num_tokens = int((encoder_segments > 0).sum() + (decoder_segments > 0).sum())
    if config.model.is_decoder_only:
        return MicroBatch((decoder_ids, decoder_segments), (lm, mlm), num_tokens)
    return MicroBatch((encoder_ids, encoder_segments, decoder_ids, decoder_segments), (lm, mlm), num_tokens)


def _sample(index: int, config: RunConfig) -> tuple[Tensor, ...]:
    """Two documents a stream, cut at a multiple of the axial width, and padding behind."""
    generator = torch.Generator().manual_seed(index)
    vocabulary, width = config.model.vocab_size, config.model.axial_width

    def stream(length: int, cut: int) -> tuple[Tensor, Tensor]:
        segments = torch.ones(length, dtype=torch.long)
        segments[cut:] = 2
        segments[length - 5 :] = 0
        return torch.randint(0, vocabulary, (length,), generator=generator), segments

    encoder_ids, encoder_segments = stream(config.data.encoder_seq_length, 3 * width)
    decoder_ids, decoder_segments = stream(config.data.decoder_seq_length, 2 * width)
    lm = torch.where(decoder_segments > 0, decoder_ids * 7 % vocabulary, -100)
    is_masked = (torch.rand(encoder_ids.shape, generator=generator) < 0.15) & (encoder_segments == 1) & (index % 3 == 0)
    return encoder_ids, encoder_segments, decoder_ids, decoder_segments, lm, torch.where(is_masked, encoder_ids, -100)


def replica_batches(config: RunConfig, engine: Engine, consumed: int = 0) -> Iterator[MicroBatch]:
    """Yield this replica's micro-batches, for ever, in the global order."""
    size, data = config.batch.micro_batch_size, engine.topology.data
    while True:
        yield micro_batch(consumed + data.rank * size, size, config)
        consumed += size * data.size


def start_engine(config: RunConfig, stage: int = 1, **zero: Any) -> Engine:
    """Build the engine of this rank, in a process group that is started if there is none."""
    device_type = start_distributed(local_rank=int(os.environ["LOCAL_RANK"]), timeout_seconds=120)
    layout = layout_of(config, int(os.environ["WORLD_SIZE"]))
    settings = resolve_deepspeed(config, {"zero_optimization": {"stage": stage, **zero}}, layout.data)
    return build_engine(config, settings.values, create_topology(layout), select_kernels(device_type))


def train_losses(config: RunConfig, steps: int, stage: int = 1, **zero: Any) -> list[tuple[float, ...]]:
    """Train `steps` steps; return (loss, LM loss, MLM loss, gradient norm) of each, and an evaluation at the end."""
    engine = start_engine(config, stage, **zero)
    batches = replica_batches(config, engine)
    rows: list[tuple[float, ...]] = []
    for _ in range(steps):
        result = engine.train_step(batches, learning_rate=config.optimizer.learning_rate)
        rows.append((result.loss, result.lm_loss, result.mlm_loss, result.grad_norm))
    evaluation = engine.evaluate(replica_batches(config, engine), engine.num_micro_batches)
    rows.append((evaluation.lm_loss, evaluation.mlm_loss))
    return rows
