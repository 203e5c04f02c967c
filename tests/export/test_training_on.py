"""What comes back from Transformers trains on under every kind of layout, and as under any other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from export_cases import trained_elsewhere, write_case
from synthetic import replica_batches, small_config, start_engine

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.schema import CheckpointConfig
from megatron_omega.export.hugging_face.importing import import_folder
from megatron_omega.export.native import open_export
from megatron_omega.launching.local_ranks import run_ranks

LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "TP 2": ({"tensor_parallel_size": 2}, 1),
    "PP 2": ({"pipeline_parallel_size": 2}, 1),
    "ZeRO-3": ({}, 3),
}
"""Sizes, and the ZeRO stage; two ranks each."""


def losses(checkpoint: Path, folder: Path, layout: str) -> list[tuple[float, float]]:
    """Start with the weights of `checkpoint`, train three steps; return the loss and gradient norm of each."""
    sizes, stage = LAYOUTS[layout]
    with open_checkpoint(checkpoint) as source:
        model, identity = source.config["model"], source.identity
    batch = {"micro_batch_size": 2, "global_batch_size": 8}
    config = small_config(model=model, parallel=sizes, batch=batch)  # pyright: ignore[reportArgumentType]
    engine = start_engine(config, stage)
    settings: dict[str, Any] = {"identity": identity, "run_config": config.model_dump(mode="json")}
    store = CheckpointStore(folder, config=CheckpointConfig(), topology=engine.topology, **settings)
    store.load(engine, checkpoint, weights_only=True)
    batches = replica_batches(config, engine)
    results = [engine.train_step(batches, learning_rate=3e-3) for _ in range(3)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.distributed
def test_an_imported_model_trains_on_under_every_layout(tmp_path: Path) -> None:
    export, _ = write_case("omega", tmp_path / "case")
    folder = trained_elsewhere(export, tmp_path / "tuned")
    base = open_export(export)
    checkpoint = import_folder(
        folder, tmp_path / "imported", tokenizer=export / "tokenizer.model", base=base
    ).checkpoint
    base.close()
    found = {
        layout: run_ranks(partial(losses, checkpoint, tmp_path / "run", layout), 2, timeout_seconds=180)[0]
        for layout in LAYOUTS
    }
    for layout, steps in found.items():
        for (loss, norm), (wanted, wanted_norm) in zip(steps, found["TP 2"], strict=True):
            assert loss == pytest.approx(wanted, rel=1e-5) and norm == pytest.approx(wanted_norm, rel=1e-4), layout
    assert found["TP 2"][2][0] < found["TP 2"][0][0]
