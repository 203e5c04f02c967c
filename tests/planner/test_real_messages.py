"""The plan's messages against those of the real engine: every one that layers, losses and stages send in a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
import torch
from synthetic import small_config, start_engine
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_omega.engine.results import MicroBatch
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel.shared_memory import SharedMemoryGroup
from megatron_omega.planner.candidates import of_config
from megatron_omega.planner.estimate import Planner
from megatron_omega.planner.hardware import find_hardware
from megatron_omega.planner.messages import data_bytes, step_bytes
from megatron_omega.planner.plan_files import ZERO
from megatron_omega.planner.work import pipeline_messages, table_parameters

pytestmark = pytest.mark.distributed
NAMES = {
    "reduce": "reduce_",
    "broadcast": "broadcast_",
    "all_reduce": "allreduce_",
    "all_gather": "_allgather_base_",
    "reduce_scatter": "_reduce_scatter_base_",
}
METHODS = {
    "broadcast": "broadcast_",
    "allreduce": "allreduce_",
    "all_gather_single": "_allgather_base_",
    "reduce_scatter_single": "_reduce_scatter_base_",
    "send": "send",
}
"""What groups of one host do by themselves, and torch's dispatcher does not see."""
KINDS = {name: kind for kind, name in NAMES.items()} | {"send": "send"}
RANKS = 2
BOOKKEEPING_BYTES = 64
"""The engine also reduces norms, losses and token counts: a few numbers each."""


class _Sent(TorchDispatchMode):
    """Counts what goes to the process groups, as (operation, bytes of the full tensor)."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[tuple[str, int]] = Counter()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Any:
        for method, name in METHODS.items():
            self._patch.setattr(SharedMemoryGroup, method, self._counted(name, getattr(SharedMemoryGroup, method)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _counted(self, name: str, method: Any) -> Any:
        def counted(group: SharedMemoryGroup, *arguments: Any) -> Any:
            self._count(name, arguments)
            return method(group, *arguments)

        return counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func._overloadpacket).partition(".")
        if namespace == "c10d" and name in {*NAMES.values(), "send"}:
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, arguments: Any) -> None:
        tensor = arguments[1] if name == NAMES["reduce_scatter"] else arguments[0]
        while isinstance(tensor, list | tuple):
            tensor = tensor[0]
        self.messages[name, tensor.numel() * tensor.element_size()] += 1


def _batches(encoder: int, decoder: int) -> Iterator[MicroBatch]:
    """One micro-batch for ever, with every encoder token masked, as the plan counts them."""
    ids = {length: torch.ones(2, length, dtype=torch.int64) for length in (encoder, decoder)}
    inputs = (ids[encoder], ids[encoder], ids[decoder], ids[decoder])
    return repeat(MicroBatch(inputs, (ids[decoder], ids[encoder])))


def _differences(parallel: dict[str, Any]) -> tuple[dict[Any, int], dict[Any, int], int]:
    """Train two steps; return what the second sent beyond the plan, what it did not send, and how much was planned."""
    config = small_config(parallel=parallel)
    engine = start_engine(config)
    batches = _batches(config.data.encoder_seq_length, config.data.decoder_seq_length)
    engine.train_step(batches, learning_rate=1e-3)
    with _Sent() as sent:
        engine.train_step(batches, learning_rate=1e-3)
    planned = _planned(config, engine.topology.pipeline.rank)
    found = Counter({message: n for message, n in sent.messages.items() if message[1] > BOOKKEEPING_BYTES})
    return dict(found - planned), dict(planned - found), planned.total()


def _planned(config: Any, rank: int) -> Counter[tuple[str, int]]:
    planner, candidate = Planner(config, find_hardware("cpu")), of_config(config, RANKS, 1)
    estimate, works = planner.estimate(candidate), planner.works(candidate)
    times = estimate.micro_batches
    planned: Counter[tuple[str, int]] = Counter()
    for index in candidate.stages_of(rank):
        stage = estimate.stages[index]
        for message, count in stage.messages(config, works).items():
            planned[NAMES[message.kind], message.num_bytes] += count * times
        if index + 1 < len(estimate.stages):
            for size in pipeline_messages(config, stage.kinds[-1], estimate.stages[index + 1].kinds[0])[0]:
                planned["send", size] += times
        if index:
            for size in pipeline_messages(config, estimate.stages[index - 1].kinds[-1], stage.kinds[0])[1]:
                planned["send", size] += times
    table = table_parameters(config)
    parameters = table + sum(estimate.stages[index].parameters(config, works) for index in candidate.stages_of(rank))
    planned["allreduce_", data_bytes(config, candidate, parameters, times)["all_reduce"]] += 1  # one replica too
    if candidate.pipeline > 1:
        planned["allreduce_", 4 * table] += 1  # the tied table's gradient
    return planned


def _bytes_by_kind(stage: int, optimizer: str) -> tuple[dict[str, int], dict[str, int]]:
    """Train two steps of two replicas; return the bytes that the plan and the second step sent, by kind of call."""
    config = small_config(
        model={"hidden_size": 96, "ffn_hidden_size": 1536, "vocab_size": 2048}, optimizer={"name": optimizer}
    )
    engine = start_engine(config, **ZERO[stage])
    batches = _batches(config.data.encoder_seq_length, config.data.decoder_seq_length)
    engine.train_step(batches, learning_rate=1e-3)
    with _Sent() as sent:
        engine.train_step(batches, learning_rate=1e-3)
    found: Counter[str] = Counter()
    for (name, size), count in sent.messages.items():
        if size > BOOKKEEPING_BYTES or name != NAMES["all_reduce"]:
            found[KINDS[name]] += size * count
    planner, candidate = Planner(config, find_hardware("cpu")), of_config(config, RANKS, stage)
    estimate, works = planner.estimate(candidate), planner.works(candidate)
    return dict(step_bytes(config, candidate, estimate.stages, works, 0, estimate.micro_batches)), dict(+found)


@pytest.mark.parametrize(("stage", "optimizer"), [*((stage, "adamw") for stage in range(4)), (1, "muon"), (3, "muon")])
def test_replicas_exchange_what_the_plan_says(stage: int, optimizer: str) -> None:
    """Whole and partitioned tensors both: the largest are beyond what ZeRO-3 keeps, the smallest below it."""
    for planned, sent in run_ranks(_bytes_by_kind, RANKS, stage, optimizer, timeout_seconds=150):
        assert planned == sent


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_parallel_size": 2, "recompute": "none"},
        {"tensor_parallel_size": 2, "sequence_parallel": True, "recompute": "full"},
        {"pipeline_parallel_size": 2, "recompute": "none"},
        {"pipeline_parallel_size": 2, "recompute": "none", "stage_boundaries": (5,)},
        {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_stages": 3, "recompute": "none"},
    ],
    ids=["tensor", "sequence", "bridge", "inside the decoder", "interleaved"],
)
def test_the_engine_sends_what_the_plan_says(parallel: dict[str, Any]) -> None:
    for beyond, missing, planned in run_ranks(_differences, RANKS, parallel, timeout_seconds=150):
        assert planned > 3
        assert missing == {} and beyond == {}
