"""Muon: what it makes of matrices, which matrices they are, and the same step under every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from synthetic import replica_batches, small_config, start_engine, train_losses

from megatron_omega.engine.internals import base_optimizer, engine_holdings
from megatron_omega.engine.muon import is_matrix, orthogonal, orthogonal_update
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.parameters import declared_parameters

MUON = {"name": "muon", "muon_learning_rate": 0.02, "gradient_clipping": 0.5, "learning_rate": 1e-2}


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 12), (1, 12, 40)])
def test_singular_values_become_about_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
    assert values.min() > 0.3 and values.max() < 1.3
    assert not orthogonal(torch.zeros(shape)).any()


def test_matrices_are_those_of_the_layers_and_each_is_whole() -> None:
    omega = Omega(ModelContext(small_config().model))
    infos = {info.name: info for info, _ in declared_parameters(omega)}
    taken = {name.partition("layers.0.")[2] for name, info in infos.items() if is_matrix(info) and "layers.0" in name}
    assert taken == {
        "attention.qkv.weight", "attention.out.weight", "cross.q.weight", "cross.kv.weight", "cross.out.weight",
        "feed_forward.gate_up.weight", "feed_forward.down.weight",
    }  # fmt: skip
    qkv, out = infos["encoder.layers.0.attention.qkv.weight"], infos["encoder.layers.0.attention.out.weight"]
    momentum = torch.randn(qkv.shape)
    update = orthogonal_update(qkv, momentum)
    for branch in range(qkv.shape[0]):
        for part in range(3):
            alone = orthogonal(momentum[branch, part].reshape(1, -1, 48))[0]
            assert torch.allclose(update[branch, part].reshape(-1, 48), alone, atol=1e-5)
    momentum = torch.randn(out.shape)
    update = orthogonal_update(out, momentum)
    for branch in range(out.shape[1]):
        alone = orthogonal(momentum[:, branch].reshape(1, 48, -1))[0]
        assert torch.allclose(update[:, branch].reshape(48, -1), alone, atol=1e-5)


def _train(parallel: dict[str, Any], stage: int) -> list[tuple[float, ...]]:
    return train_losses(small_config(optimizer=MUON, parallel=parallel), 3, stage)


def _moments(stage: int) -> set[tuple[bool, bool]]:
    engine = start_engine(small_config(optimizer=MUON), stage)
    state = base_optimizer(engine.deepspeed).state
    holdings = engine_holdings(engine.deepspeed)
    engine.train_step(replica_batches(small_config(optimizer=MUON), engine), learning_rate=1e-2)
    return {(is_matrix(mine.info), "exp_avg_sq" in state[mine.flat]) for mine in holdings}


@pytest.mark.distributed
def test_every_layout_takes_the_same_step() -> None:
    """Slices of tensor-parallel ranks, partitions that cut matrices anywhere, and stages of a pipeline."""
    (alone,) = run_ranks(_train, 1, {}, 0, timeout_seconds=200)
    tensor, pipeline = {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    for ranks, parallel, stage in ((4, tensor, 3), (4, pipeline, 1), (2, {}, 2)):
        for rows in run_ranks(_train, ranks, parallel, stage, timeout_seconds=200):
            for expected, found in zip(alone, rows, strict=True):
                assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.distributed
def test_matrices_have_one_moment() -> None:
    (found,) = run_ranks(_moments, 1, 1, timeout_seconds=200)
    assert found == {(True, False), (False, True)}
