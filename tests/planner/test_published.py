"""The roofline against published iteration times of another system, with the same efficiencies for all."""

from __future__ import annotations

import pytest

from megatron_omega.planner.hardware import find_hardware
from megatron_omega.planner.published import RUNS, PublishedRun, iteration_seconds

A100 = find_hardware("a100-80g")


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
@pytest.mark.parametrize("selective", [True, False], ids=["selective", "full"])
def test_predicted_iteration_times_are_within_ten_percent(run: PublishedRun, selective: bool) -> None:
    measured = run.selective_seconds if selective else run.full_seconds
    assert iteration_seconds(run, A100, selective=selective) == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(("name", "mfu"), [("22B", 0.415), ("175B", 0.514), ("530B", 0.560), ("1T", 0.563)])
def test_the_runs_are_transcribed_correctly_for_they_give_the_published_mfu(name: str, mfu: float) -> None:
    run = next(run for run in RUNS if run.name == name)
    peak = 312e12 * 8 * run.pipeline
    assert run.model_flops / run.selective_seconds / peak == pytest.approx(mfu, abs=0.002)
