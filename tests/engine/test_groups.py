"""Every group of the grid is created once: DeepSpeed takes ours."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from datetime import timedelta
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_omega.config.deepspeed import resolve_deepspeed
from megatron_omega.config.layout import Layout
from megatron_omega.engine.repairs import handing_over_groups
from megatron_omega.engine.start import start_distributed
from megatron_omega.model.kernels import PORTABLE
from megatron_omega.parallel.topology import create_topology
from megatron_omega.run.construction import build_engine
from megatron_omega.studies.made_up import small_config

LAYOUT = Layout(pipeline=8, data=64, tensor=2)
RANK = 517
PATIENCE = timedelta(seconds=61)
OF_THE_GRID = 8 * 64 + 8 * 2 + 64 * 2 + 64
"""Along the tensor, the data and the pipeline axis, and the replicas."""


class Created(list[tuple[int, ...]]):
    """The groups that a rank creates, each with all others that exist by then; how long their messages may take."""

    def __init__(self) -> None:
        self.patience: list[timedelta | None] = []


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> Iterator[Created]:
    """A run of 1,024 ranks that exists for one of them alone."""
    dist.init_process_group("fake", rank=RANK, world_size=LAYOUT.world_size, store=FakeStore())
    found, create = Created(), dist.new_group

    def counted(ranks: Any, timeout: timedelta | None = None, **options: Any) -> Any:
        found.append(tuple(ranks))
        found.patience.append(timeout)
        return create(ranks, timeout=timeout, **options)

    monkeypatch.setattr(dist, "new_group", counted)
    monkeypatch.setenv("LOCAL_RANK", "0")
    start_distributed(local_rank=0, timeout_seconds=60)
    yield found
    dist.destroy_process_group()


def test_deepspeeds_grid_takes_ours(created: Created) -> None:
    topology = create_topology(LAYOUT)
    assert len(created) == len(set(created)) == OF_THE_GRID == 720
    names = PipeModelDataParallelTopology(num_pp=LAYOUT.pipeline, num_mp=LAYOUT.tensor, num_dp=LAYOUT.data)
    with handing_over_groups(topology), contextlib.redirect_stdout(io.StringIO()):
        grid = PipelineParallelGrid(topology=names)
    assert len(created) == 720
    assert grid.dp_proc_group is topology.data.handle
    assert grid.pp_proc_group is topology.pipeline.handle
    assert grid.slice_proc_group is topology.tensor.handle
    assert grid.ds_model_proc_group is topology.model.handle


def test_an_engine_creates_each_group_once_and_all_are_as_patient_as_the_run(created: Created) -> None:
    """The grid's, those of the stages that share the token table, one for each direction between neighbours."""
    sizes = {"pipeline_parallel_size": LAYOUT.pipeline, "tensor_parallel_size": LAYOUT.tensor, "recompute": "none"}
    batch = {"micro_batch_size": 1, "global_batch_size": 512}
    config = small_config(model={"encoder_layers": 4, "decoder_layers": 4}, parallel=sizes, batch=batch)
    values = resolve_deepspeed(config, {"zero_optimization": {"stage": 1}}, LAYOUT.data).values
    with contextlib.redirect_stdout(io.StringIO()):
        build_engine(config, values, create_topology(LAYOUT, timeout=PATIENCE), PORTABLE)
    tied, directions = 64 * 2, 2 * 7
    assert len(created) == OF_THE_GRID + tied + directions
    assert len(set(created)) == OF_THE_GRID + tied + directions // 2  # a direction's ranks are those of the other
    assert set(created.patience) == {PATIENCE}


def test_groups_of_an_axis_are_one_split_where_the_world_is_bound_to_a_device(
    created: Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits: list[list[list[int]]] = []

    def split_group(*, split_ranks: list[list[int]], timeout: timedelta | None) -> Any:
        assert timeout == PATIENCE
        splits.append(split_ranks)
        return object() if any(RANK in ranks for ranks in split_ranks) else None

    assert dist.group.WORLD is not None
    dist.group.WORLD.bound_device_id = torch.device("cpu", 0)
    monkeypatch.setattr(dist, "split_group", split_group)
    topology = create_topology(LAYOUT, timeout=PATIENCE)
    assert [len(split) for split in splits] == [512, 16, 128, 64] and not created
    assert all(sorted(chain.from_iterable(split)) == list(range(LAYOUT.world_size)) for split in splits)
    with handing_over_groups(topology):
        for pipeline in LAYOUT.groups("pipeline"):
            found = dist.new_group([pipeline[0], pipeline[-1]])
            assert found is dist.GroupMember.NON_GROUP_MEMBER  # rank 517 is in the middle
    assert len(splits) == 5 and len(splits[-1]) == 128 and not created
