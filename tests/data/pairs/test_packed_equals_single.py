"""Packed pairs train as one pair at a time: the same loss, the same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omega.config.labels import IGNORED_LABEL
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.batch import Batch, stack
from megatron_omega.data.pairs.source import PairSource
from megatron_omega.data.sources import open_sources
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.run.batches import to_micro_batch

PAIRS = 24


def config_of(model_path: Path, records: Path, encoder_layers: int) -> RunConfig:
    model: dict[str, Any] = {
        "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 600,
        "encoder_layers": encoder_layers, "decoder_layers": 2, "local_window": 8, "axial_width": 4,
    }  # fmt: skip
    task = {"path": str(records), "prompt": "{q}", "target": "{a}"}
    data = {"tokenizer": str(model_path), "tasks": [task], "split": (1, 0, 0)}
    lengths = {"encoder_seq_length": 64 if encoder_layers else 0, "decoder_seq_length": 48}
    return RunConfig.model_validate({"model": model, "data": data | lengths, "evaluation": {"interval_steps": 0}})


def one_at_a_time(source: PairSource) -> list[Batch]:
    """Return a row for each pair, which holds nothing else."""
    rows = source.corpora[0]
    found = []
    for number in range(PAIRS):
        row = rows.holder(number)
        place = rows.members(row).index(number) + 1
        batch, _ = rows.build(row, 0)
        inside = [batch.encoder_segments == place, batch.decoder_segments == place]

        def alone(values: Any, side: int, fill: int, inside: Any = inside) -> Any:
            kept = values[inside[side]]
            out = values * 0 + fill
            out[0, : len(kept)] = kept
            return out

        found.append(
            Batch(
                alone(batch.encoder_ids, 0, 0), alone(batch.encoder_segments // place, 0, 0),
                alone(batch.decoder_ids, 1, 0), alone(batch.decoder_segments // place, 1, 0),
                alone(batch.lm_labels, 1, IGNORED_LABEL), alone(batch.mlm_labels, 0, IGNORED_LABEL),
            )
        )  # fmt: skip
    return found


def loss_and_gradients(config: RunConfig, batch: Batch, labels: int) -> tuple[float, dict[str, Tensor]]:
    model = Omega(ModelContext.of(config))
    micro = to_micro_batch(batch)
    loss = model(micro.inputs, (*micro.labels, torch.tensor([1 / labels, 0.0]), micro.masked_rows))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("encoder_layers", [2, 0])
def test_packed_equals_single(
    encoder_layers: int, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = tmp_path / "qa.jsonl"
    lines = [{"q": "the model " * (k % 5) + f"reads {k}", "a": "one " * (k % 4) + str(k)} for k in range(PAIRS)]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(model_path, records, encoder_layers)
    source = open_sources(config).train
    assert isinstance(source, PairSource)
    packed = stack([source[k].row for k in range(len(source))])
    singles = stack(one_at_a_time(source))
    labels = int((packed.lm_labels != IGNORED_LABEL).sum())
    assert len(source) < PAIRS / 2
    assert labels == int((singles.lm_labels != IGNORED_LABEL).sum())
    (loss, gradients), (wanted, expected) = (loss_and_gradients(config, each, labels) for each in (packed, singles))
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
