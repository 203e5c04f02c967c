"""Rates are found again in times that were made from them. On a real machine: benchmarks/real_runs.py time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_omega.planner.hardware import Hardware, find_hardware, read_hardware
from megatron_omega.planner.stages import layer_seconds
from megatron_omega.planner.work import Work, layer_works
from megatron_omega.studies.calibration import fit_latency, fit_rates, layer_config

CPU = find_hardware("cpu", file=read_hardware())
SHAPES = [(24, 48, 2, 16), (96, 768, 8, 128), (512, 8192, 16, 64)]


def works(ranks: int = 1) -> list[Work]:
    return [
        layer_works(layer_config(shape, tensor_parallel_size=ranks))[kind]
        for shape in SHAPES
        for kind in ("encoder", "decoder")
    ]


def seconds(machine: Hardware, layers: list[Work], ranks: int = 1) -> list[tuple[float, float]]:
    found = (layer_seconds(work, machine, "fp32", 4, ranks) for work in layers)
    return [(time.forward, time.backward) for time in found]


def test_rates_describe_the_times_they_were_fitted_to() -> None:
    peak = {dtype: 0.8 * rate for dtype, rate in CPU.facts.peak_flops.items()}
    changes = {"peak_flops": peak, "memory_bandwidth": 2.1e10, "launch_seconds": 1.2e-5}
    truth = replace(CPU, facts=CPU.facts.model_copy(update=changes))
    measured = np.array(seconds(truth, works())).flatten()
    fitted = replace(CPU, facts=fit_rates(CPU, works(), measured))
    assert np.array(seconds(fitted, works())).flatten() == pytest.approx(measured, rel=0.08)
    assert fitted.facts.launch_seconds == pytest.approx(1.2e-5, rel=0.1)


def test_the_latency_of_a_hop_is_found_in_layers_that_ranks_share() -> None:
    truth = replace(CPU, link=CPU.link.model_copy(update={"latency": 7e-4}))
    measured = np.array(seconds(truth, works(2), 2)).sum(axis=1)
    silent = replace(CPU, link=CPU.link.model_copy(update={"latency": 0.0}))
    assert fit_latency(silent, works(2), measured, 2) == pytest.approx(7e-4)


def test_a_latency_is_never_negative() -> None:
    measured = np.array(seconds(CPU, works(2), 2)).sum(axis=1)
    assert fit_latency(CPU, works(2), measured / 2, 2) == 0.0
