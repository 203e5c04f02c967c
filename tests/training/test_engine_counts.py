"""What the engine does and does not do, counted: all-reduces, backward passes, skipped steps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from synthetic import micro_batch, replica_batches, small_config, start_engine

from megatron_omega.config.layout import Layout
from megatron_omega.engine.results import MicroBatch
from megatron_omega.engine.start import start_distributed
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.model.context import ModelContext
from megatron_omega.model.layers import DecoderLayer, EncoderLayer
from megatron_omega.model.stream import Stream
from megatron_omega.parallel.parameters import declared_parameters
from megatron_omega.parallel.topology import create_topology

pytestmark = pytest.mark.distributed
LENGTH = 32


class CountedAllReduces:
    """Counts calls of torch.distributed.all_reduce."""

    def __enter__(self) -> CountedAllReduces:
        self.calls = 0
        self._original = dist.all_reduce

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return self._original(*arguments, **options)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._original


def _count_all_reduces() -> dict[str, tuple[int, int]]:
    start_distributed(local_rank=0, timeout_seconds=60)
    parallel = create_topology(Layout(tensor=2)).tensor_parallel()
    context = ModelContext.of(small_config(), parallel)
    stream = Stream(torch.ones(1, LENGTH, dtype=torch.long), context.kernels)
    hidden, memory = (torch.randn(1, LENGTH, 48, requires_grad=True) for _ in range(2))
    counts = {}
    for name, layer, state in (
        (
            "encoder",
            EncoderLayer("encoder.layers.0", context, context.model.layer_branches("encoder", 0)),
            (hidden, stream),
        ),
        (
            "decoder",
            DecoderLayer("decoder.layers.0", context, context.model.layer_branches("decoder", 0)),
            (hidden, stream, memory, stream),
        ),
    ):
        with CountedAllReduces() as forward:
            output = layer(*state)
        with CountedAllReduces() as backward:
            output.sum().backward()
        counts[name] = (forward.calls, backward.calls)
    return counts


def test_all_reduces_per_layer_and_direction() -> None:
    for counts in run_ranks(_count_all_reduces, 2, timeout_seconds=90):
        assert counts == {"encoder": (2, 2), "decoder": (3, 3)}


def _count_backward_passes(cuts: list[tuple[int, ...]], schedule: str) -> list[dict[str, int]]:
    """For each cut: how often each layer's weights received a gradient in one step."""
    found = []
    for cut in cuts:
        parallel = {"pipeline_parallel_size": 2, "stage_boundaries": cut, "pipeline_schedule": schedule}
        config = small_config(parallel=parallel)
        engine = start_engine(config)
        passes: Counter[str] = Counter()
        for info, parameter in declared_parameters(engine.module):
            if info.name.endswith("feed_forward.down.weight"):
                parameter.register_hook(lambda gradient, name=info.name, passes=passes: passes.update([name]))
        engine.train_step(replica_batches(config, engine), learning_rate=1e-3)
        found.append(dict(passes))
    return found


@pytest.mark.parametrize(
    ("schedule", "cuts"),
    [("1f1b", [(cut,) for cut in range(1, 7)]), ("dualpipev", [(2, 4, 5), (1, 2, 4), (1, 5, 6)])],
)
def test_no_layer_runs_its_backward_twice(schedule: str, cuts: list[tuple[int, ...]]) -> None:
    ranks = run_ranks(_count_backward_passes, 2, cuts, schedule, timeout_seconds=180)
    micro_batches = 16 // 2
    names = [
        f"{stack}.layers.{index}.feed_forward.down.weight" for stack in ("encoder", "decoder") for index in range(2)
    ]
    for position, cut in enumerate(cuts):
        merged = Counter[str]()
        for rank in ranks:
            merged.update(rank[position])
        assert merged == dict.fromkeys(names, micro_batches), cut


def _step_with_a_bad_gradient(stage: int, pipeline: int) -> dict[str, Any]:
    """Two steps; in the first one, one rank's gradient is not a number."""
    config = small_config(parallel={"pipeline_parallel_size": pipeline})
    engine = start_engine(config, stage)
    before = _weights(engine)
    parameter = next(
        parameter
        for info, parameter in declared_parameters(engine.module)
        if info.name.endswith("attention_norm.weight")
    )
    spoiled = parameter.register_hook(lambda gradient: gradient * math.nan if dist.get_rank() == 1 else gradient)
    first = engine.train_step(replica_batches(config, engine), learning_rate=1e-2)
    unchanged = all(torch.equal(left, right) for left, right in zip(before, _weights(engine), strict=True))
    spoiled.remove()
    second = engine.train_step(replica_batches(config, engine), learning_rate=1e-2)
    return {"first": first.skipped, "unchanged": unchanged, "second": second.skipped, "norm": second.grad_norm}


def _weights(engine: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


@pytest.mark.parametrize(("stage", "pipeline"), [(0, 1), (1, 1), (2, 1), (3, 1), (1, 2)])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(stage: int, pipeline: int) -> None:
    for found in run_ranks(_step_with_a_bad_gradient, 2, stage, pipeline, timeout_seconds=90):
        assert found["first"] and found["unchanged"] and not found["second"]
        assert math.isfinite(found["norm"])


def _evaluation_of_two_shapes() -> tuple[float, float, float]:
    config = small_config()
    engine = start_engine(config)

    def batches() -> Any:
        yield MicroBatch(*_parts(0, 2, config))
        yield MicroBatch(*_parts(2, 2, config))

    together = engine.evaluate(batches(), 2)
    alone = [engine.evaluate(iter([MicroBatch(*_parts(start, 2, config))]), 1) for start in (0, 2)]
    tokens = sum(result.num_tokens for result in alone)
    mean = sum(result.lm_loss * result.num_tokens for result in alone) / tokens
    return together.lm_loss, mean, together.num_tokens - tokens


def _parts(start: int, count: int, config: Any) -> tuple[Any, Any]:
    batch = micro_batch(start, count, config)
    return batch.inputs, batch.labels


def test_evaluation_is_a_mean_over_tokens() -> None:
    together, mean, difference = run_ranks(_evaluation_of_two_shapes, 1, timeout_seconds=60)[0]
    assert together == pytest.approx(mean, rel=1e-6) and difference == 0
