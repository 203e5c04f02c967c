"""When a rank is fullest, and with what. Beside real processes: benchmarks/real_runs.py memory."""

from __future__ import annotations

import pytest

from megatron_omega.planner.memory import InFlight, Moment, States, fullest

MILLION = 1_000_000
NO_LAYERS = InFlight(1, 0, (Moment(0, 0, 0),))


def held(states: States) -> int:
    """Bytes between two micro-batches, buckets apart."""
    return states.in_backward(0, is_first=False)._replace(buffers=0).total


def test_states_of_zero_stages_follow_the_textbook() -> None:
    assert held(States(MILLION, "fp32", 0, 1)) == 16_000_000  # weights, gradients, two moments
    assert held(States(MILLION, "bf16", 1, 1)) == 20_000_000  # and fp32 master and gradients beside the bf16 ones
    assert held(States(MILLION, "bf16", 1, 10)) == 8_000_000 + 1_200_000
    sizes = [held(States(MILLION, "bf16", stage, 10)) for stage in (3, 2, 1)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("stage", "copies"),
    [(0, 5), (1, 6), (2, 7), (3, 8)],  # of all weights, by real processes: 5.0, 6.0, 7.0 and, below a bucket, 8
)
def test_large_states_and_small_activations_are_fullest_when_gradients_are_reduced(stage: int, copies: int) -> None:
    states = States(MILLION, "fp32", stage, 1, is_cpu=True)
    end_of_backward = InFlight(1, 0, (Moment(3, 5, 0), Moment(1, 5, MILLION)))
    found = fullest(states, [end_of_backward], 2)
    assert found.total - found.runtime == pytest.approx(copies * 4 * MILLION, abs=10)


def test_large_activations_are_fullest_at_the_first_layer_of_a_backward_pass() -> None:
    states, large = States(MILLION, "fp32", 1, 1, is_cpu=True), 10**9
    found = fullest(states, [InFlight(1, 0, (Moment(large, 7, 0), Moment(large // 4, 7, 3 * MILLION // 4)))], 2)
    assert (found.activations, found.working) == (large, 7)


def test_gradients_do_not_exist_before_the_first_backward_pass() -> None:
    states = States(MILLION, "fp32", 1, 1)
    first, later = (states.in_backward(MILLION // 4, is_first=is_first).gradients for is_first in (True, False))
    assert (first, later) == (MILLION, 4 * MILLION)


def test_a_pipeline_holds_the_micro_batches_that_wait() -> None:
    large, states = 10**9, States(MILLION, "fp32", 1, 1, is_cpu=True)
    part = InFlight(3, 50, (Moment(large, 0, 0),))
    found = fullest(states, [part], 8)
    assert (found.activations, found.buffers) == (3 * large, 150)
    both = fullest(states, [part, InFlight(1, 0, (Moment(large, 0, 0),))], 8)
    assert both.activations == 4 * large


def test_a_gpu_allocates_whole_buckets() -> None:
    gpu, cpu = (States(MILLION, "bf16", 2, 8, is_cpu=is_cpu) for is_cpu in (False, True))
    on_gpu, on_cpu = (fullest(states, [NO_LAYERS], 4).buffers for states in (gpu, cpu))
    assert on_gpu == 2 * 200_000_000 * 2
    assert on_cpu <= 2 * 2 * MILLION


def test_stage_3_gathers_what_other_ranks_hold() -> None:
    alone, shared = (States(MILLION, "bf16", 3, dp) for dp in (1, 8))
    assert shared.in_backward(0, is_first=True).buffers - alone.in_backward(0, is_first=True).buffers == 2 * MILLION
    assert shared.in_backward(MILLION, is_first=True).buffers == alone.in_backward(MILLION, is_first=True).buffers
