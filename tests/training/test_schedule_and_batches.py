from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.config.layout import Layout
from megatron_omega.config.schema import BatchConfig, OptimizerConfig, RampUp, ScheduleConfig
from megatron_omega.engine.optimizer import Clipper, build_optimizer, parameter_groups, set_learning_rate
from megatron_omega.parallel.parameters import UNSCALED, Scales, declare_parameter
from megatron_omega.parallel.tensor_parallel import SERIAL
from megatron_omega.parallel.topology import create_topology
from megatron_omega.training.batch_size import batch_size_at, consumed_after, samples_of_step, with_interval
from megatron_omega.training.learning_rate import learning_rate_fraction

DECAYS = ("cosine", "linear", "wsd", "inverse_square_root", "constant")


@pytest.mark.parametrize("decay", DECAYS)
def test_schedules_warm_up_peak_and_never_rise_again(decay: str) -> None:
    schedule = ScheduleConfig(decay=decay, warmup_steps=10, min_learning_rate_fraction=0.1)  # pyright: ignore[reportArgumentType]
    rates = [learning_rate_fraction(schedule, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rates[9:]))
    assert max(rates) == pytest.approx(1.0)


def test_schedules_end_where_they_should() -> None:
    def at(decay: str, step: int) -> float:
        schedule = ScheduleConfig(decay=decay, warmup_steps=10, min_learning_rate_fraction=0.1, decay_fraction=0.2)  # pyright: ignore[reportArgumentType]
        return learning_rate_fraction(schedule, step, 110)

    assert at("cosine", 60) == pytest.approx(0.55) and at("cosine", 110) == pytest.approx(0.1)
    assert at("linear", 60) == pytest.approx(0.55) and at("linear", 110) == pytest.approx(0.1)
    assert at("wsd", 87) == 1.0 and at("wsd", 99) == pytest.approx(0.55)
    assert at("inverse_square_root", 39) == pytest.approx(0.5)
    assert at("constant", 109) == 1.0


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 6), st.integers(1, 500))
def test_ramp_up_grows_in_equal_parts_and_counts_add_up(start: int, increment: int, parts: int, samples: int) -> None:
    batch = BatchConfig(
        global_batch_size=start + increment * parts, ramp_up=RampUp(start=start, increment=increment, samples=samples)
    )
    consumed, sizes = 0, []
    for _ in range(60):
        sizes.append(batch_size_at(batch, consumed))
        consumed += sizes[-1]
    assert sizes == sorted(sizes) and sizes[0] == start and set(sizes) <= set(range(start, 99, increment))
    assert consumed_after(batch, 60) == consumed
    assert batch_size_at(batch, samples) == batch.global_batch_size


def make(name: str, shape: tuple[int, ...], scales: Scales = UNSCALED) -> torch.nn.Parameter:
    return declare_parameter(name, shape, parallel=SERIAL, seed=0, std=1.0, scales=scales)


def test_parameters_are_grouped_by_what_they_declare() -> None:
    parameters = [
        make("a", (2, 2)),
        make("b", (2,), scales=Scales(weight_decay=0.0)),
        make("c", (2, 2), scales=Scales(0.5, 2.0, 0.1)),
    ]
    groups = parameter_groups(parameters, OptimizerConfig(weight_decay=0.1))
    found = {
        (group["lr_scale"], group["weight_decay"], group["eps"]): [id(p) for p in group["params"]] for group in groups
    }
    first, second, third = ([id(parameter)] for parameter in parameters)
    assert found == {(1.0, 0.1, 1e-8): first, (1.0, 0.0, 1e-8): second, (0.5, 0.2, 1e-9): third}
    optimizer, choice = build_optimizer(parameters, OptimizerConfig(), create_topology(Layout()), device_type="cpu")
    set_learning_rate(optimizer, 1e-2)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [5e-3, 1e-2, 1e-2] and "AdamW" in choice


def test_own_clipping_equals_torchs_and_skips_what_is_not_finite() -> None:
    settings = OptimizerConfig(gradient_clipping=0.5, learning_rate=0.1)
    ours, theirs = make("a", (3, 2)), make("a", (3, 2))
    topology = create_topology(Layout())
    clipper = Clipper(topology, settings.gradient_clipping)
    clipped, _ = build_optimizer([ours], settings, topology, device_type="cpu", clipper=clipper)
    plain, _ = build_optimizer([theirs], settings, topology, device_type="cpu")
    for scale in (1.0, 0.01):
        gradient = scale * torch.arange(6.0).view(3, 2)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        clipped.step()
        plain.step()
        assert clipper.global_norm == pytest.approx(norm.item())
        assert torch.allclose(ours, theirs, atol=1e-6)
    before = ours.detach().clone()
    ours.grad = torch.full((3, 2), math.inf)
    clipped.step()
    assert clipper.skipped and torch.equal(ours, before)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=4),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 40),
)
def test_steps_pass_over_what_is_left_out(gaps: list[tuple[int, int]], size: int, grows: bool, steps: int) -> None:
    ramp = {"start": size, "increment": size, "samples": 90} if grows else None
    batch = BatchConfig.model_validate({"global_batch_size": 3 * size, "ramp_up": ramp})
    left_out: tuple[tuple[int, int], ...] = ()
    for start, count in gaps:
        left_out = with_interval(left_out, (start, start + count))
    missing = {sample for start, count in gaps for sample in range(start, start + count)}
    assert {sample for start, stop in left_out for sample in range(start, stop)} == missing
    assert list(left_out) == sorted(left_out)
    taken, consumed = [], 0
    for _ in range(steps):
        pieces = samples_of_step(batch, consumed, left_out)
        assert sum(map(len, pieces)) == batch_size_at(batch, consumed)
        taken += [sample for piece in pieces for sample in piece]
        consumed = pieces[-1].stop
    assert consumed_after(batch, steps, left_out) == consumed
    assert taken == [sample for sample in range(consumed) if sample not in missing]
