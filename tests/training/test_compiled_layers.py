"""Compiled layers and whole-layer gathering under the real engine; traced only, since that is what engines can break."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from synthetic import replica_batches, small_config, start_engine, train_losses

from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.model.compilation import compile_layers
from megatron_omega.run import construction

pytestmark = pytest.mark.distributed
STEPS = 3


def _losses(compile_mode: str, stage: int, parallel: dict[str, Any]) -> list[tuple[float, ...]]:
    config = small_config(parallel={"recompute": "none"} | parallel, training={"compile": compile_mode})
    traced = partial(compile_layers, backend="eager", refuse_breaks=True)
    with patch.object(construction, "compile_layers", traced):
        return train_losses(config, STEPS, stage)


@pytest.mark.parametrize(
    ("stage", "parallel"),
    [(3, {}), (0, {"pipeline_parallel_size": 2}), (1, {"tensor_parallel_size": 2, "sequence_parallel": True})],
)
def test_compiled_layers_train_as_eager_ones_do(stage: int, parallel: dict[str, Any]) -> None:
    eager, compiled = (run_ranks(_losses, 2, mode, stage, parallel, timeout_seconds=240) for mode in ("off", "layers"))
    for left, right in zip(eager[0], compiled[0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)


def _gathered_weights_alive() -> tuple[int, int]:
    """Return the bytes of gathered weights that live on after a forward pass under ZeRO-3, and those of all."""
    config = small_config(parallel={"recompute": "none"})
    engine = start_engine(config, 3, stage3_param_persistence_threshold=0)
    gathered: list[tuple[weakref.ref[Any], int]] = []

    def note(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters(recurse=False):
            storage = parameter.untyped_storage()
            gathered.append((weakref.ref(storage), storage.nbytes()))

    for module in engine.module.modules():
        module.register_forward_pre_hook(note)
    batch = next(iter(replica_batches(config, engine)))
    loss = engine.deepspeed(batch.inputs, (*batch.labels, torch.ones(2)))
    alive = sum(size for storage, size in gathered if (kept := storage()) is not None and kept.nbytes())
    assert loss.isfinite()
    return alive, sum(size for _, size in gathered)


def test_zero_3_lets_gathered_weights_go() -> None:
    """Before, the graph held views of nearly all of them until the backward pass."""
    for alive, gathered in run_ranks(_gathered_weights_alive, 2, timeout_seconds=240):
        assert gathered > 500_000 and alive < 0.05 * gathered
