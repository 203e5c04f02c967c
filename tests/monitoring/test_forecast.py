"""The planner's word in the log of a run: before it, and beside what was measured after it."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import pytest

from megatron_omega.config.schema import BatchConfig, DataConfig, ModelConfig, PrecisionConfig, RunConfig
from megatron_omega.monitoring.forecast import WARM_UP_STEPS, Forecast, comparison, peak_bytes
from megatron_omega.planner.forecast import RunForecast, crowded, forecast
from megatron_omega.planner.hardware import find_hardware, read_hardware
from megatron_omega.planner.machine import Machine, cores, keep, this_machine
from megatron_omega.studies import quick_calibration

CONFIG = RunConfig(
    model=ModelConfig(
        hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, encoder_layers=2, decoder_layers=2, vocab_size=250
    ),
    data=DataConfig(encoder_seq_length=128, decoder_seq_length=128),
    precision=PrecisionConfig(dtype="fp32"),
    batch=BatchConfig(global_batch_size=4),
)


def run_forecast(**machine: Any) -> RunForecast:
    hardware = find_hardware("cpu")
    known = Machine(
        hardware, machine.get("origin", "quickly calibrated 2 hours ago"), machine.get("is_calibrated", True)
    )
    return RunForecast(forecast(CONFIG, 1, 1, hardware), known, process_bytes=2**28)


def test_the_log_has_the_forecast_first_and_the_measurement_beside_it_last(caplog: pytest.LogCaptureFixture) -> None:
    run = run_forecast()
    hook = Forecast(run)
    with caplog.at_level(logging.INFO, logger="megatron_omega"):
        hook.on_start(cast(Any, None))
        first = caplog.text
        for seconds in (9.0, *[0.5] * (WARM_UP_STEPS + 1)):
            hook.on_step_end(cast(Any, SimpleNamespace(step_seconds=seconds)))
        hook.on_close()
    assert "forecast for this machine" in first and "quickly calibrated 2 hours ago" in first
    assert "the process and its libraries" in first and f"= {run.memory_bytes / 2**30:.2f} GiB on rank 0" in first
    assert f"median step 0.5 s (forecast {run.estimate.step_seconds:.3g}, " in caplog.messages[-1]


def test_a_gap_is_told_with_its_reason() -> None:
    run = run_forecast()
    seconds, size = run.estimate.step_seconds, run.memory_bytes
    assert ". " not in comparison(run, 1.1 * seconds, int(0.9 * size), 0.5)
    assert "other programs took 50% of the cores" in comparison(run, 2 * seconds, size, 0.5)
    assert "may run at another speed now" in comparison(run, 2 * seconds, size, 0.0)
    assert "memory: the allocator" in comparison(run, seconds, 2 * size, 0.0)
    unknown = run_forecast(is_calibrated=False, origin="not calibrated: figures of another CPU")
    assert "time: not calibrated" in comparison(unknown, 0.5 * seconds, size, 0.0)


def test_ranks_that_share_cores_take_turns() -> None:
    facts = find_hardware("cpu").facts.model_copy(update={"cores": 2})
    hardware = replace(find_hardware("cpu"), facts=facts)
    alone, eight = (forecast(CONFIG, ranks, 1, hardware) for ranks in (1, 4))
    assert RunForecast(eight, Machine(hardware, "", is_calibrated=True)).ranks_per_core == 2
    assert RunForecast(alone, Machine(hardware, "", is_calibrated=True)).ranks_per_core == 1


def test_cores_are_slower_while_others_compute() -> None:
    facts = find_hardware("cpu").facts.model_copy(update={"cores": 3, "crowding": 1.5})
    hardware = replace(find_hardware("cpu"), facts=facts)
    rates = [crowded(hardware, ranks).facts.memory_bandwidth for ranks in (1, 2, 3, 8)]
    assert rates == pytest.approx([facts.memory_bandwidth / slower for slower in (1, 1.25, 1.5, 1.5)])
    assert crowded(hardware, 3).facts.launch_seconds == pytest.approx(1.5 * facts.launch_seconds)
    gpu = find_hardware("h100-80g")
    assert crowded(gpu, 8) is gpu


def test_a_neighbour_is_busy_while_it_is_wanted_and_gone_afterwards() -> None:
    with quick_calibration._busy_core():
        neighbour = psutil.Process().children()[-1]
        began = neighbour.cpu_times().user
        time.sleep(0.5)
        assert neighbour.cpu_times().user > began
    assert not neighbour.is_running()


def test_a_quick_calibration_is_kept_and_its_age_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = this_machine()
    assert found is not None and not found.is_calibrated and found.hardware.facts.cores == cores()
    path = keep(read_hardware())
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    found = this_machine()
    assert found is not None and found.is_calibrated and found.origin == "quickly calibrated 2 hours ago"
    path.write_text("nonsense: [")
    assert (again := this_machine()) is not None and not again.is_calibrated


def test_memory_that_is_touched_raises_the_peak() -> None:
    before = peak_bytes()
    held = np.ones(2 * before, dtype=np.uint8)  # more than was ever given back below the peak
    assert peak_bytes() >= held.nbytes > before
