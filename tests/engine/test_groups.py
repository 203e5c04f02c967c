"""Every group of the grid is created once: DeepSpeed takes ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_omega.config.layout import Layout
from megatron_omega.engine.repairs import handing_over_groups
from megatron_omega.engine.start import start_distributed
from megatron_omega.parallel.topology import create_topology

LAYOUT = Layout(pipeline=8, data=64, tensor=2)
RANK = 517


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """A run of 1,024 ranks that exists for one of them alone; the list of the groups it creates."""
    dist.init_process_group("fake", rank=RANK, world_size=LAYOUT.world_size, store=FakeStore())
    found: list[tuple[int, ...]] = []
    create = dist.new_group

    def counted(ranks: Any, **options: Any) -> Any:
        found.append(tuple(ranks))
        return create(ranks, **options)

    monkeypatch.setattr(dist, "new_group", counted)
    start_distributed(local_rank=0, timeout_seconds=60)
    yield found
    dist.destroy_process_group()


def test_deepspeeds_grid_takes_ours(created: list[tuple[int, ...]]) -> None:
    topology = create_topology(LAYOUT)
    assert len(created) == len(set(created)) == 8 * 64 + 8 * 2 + 64 * 2 + 64
    names = PipeModelDataParallelTopology(num_pp=LAYOUT.pipeline, num_mp=LAYOUT.tensor, num_dp=LAYOUT.data)
    with handing_over_groups(topology), contextlib.redirect_stdout(io.StringIO()):
        grid = PipelineParallelGrid(topology=names)
    assert len(created) == 720
    assert grid.dp_proc_group is topology.data.handle
    assert grid.pp_proc_group is topology.pipeline.handle
    assert grid.slice_proc_group is topology.tensor.handle
    assert grid.ds_model_proc_group is topology.model.handle
