"""The planner's word in the log of a run: before it, and beside what was measured after it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_omega.config.schema import BatchConfig, DataConfig, ModelConfig, PrecisionConfig, RunConfig
from megatron_omega.monitoring.forecast import WARM_UP_STEPS, Forecast, peak_bytes
from megatron_omega.planner.forecast import forecast
from megatron_omega.planner.hardware import find_hardware

CONFIG = RunConfig(
    model=ModelConfig(
        hidden_size=48, ffn_hidden_size=96, num_attention_heads=6, encoder_layers=2, decoder_layers=2, vocab_size=250
    ),
    data=DataConfig(encoder_seq_length=128, decoder_seq_length=128),
    precision=PrecisionConfig(dtype="fp32"),
    batch=BatchConfig(global_batch_size=4),
)


def test_the_log_has_the_forecast_first_and_the_measurement_beside_it_last(caplog: pytest.LogCaptureFixture) -> None:
    estimate = forecast(CONFIG, 1, 1, find_hardware("cpu"))
    hook = Forecast(estimate, peak_bytes() - 2**30)  # as if a GiB had been taken since
    package = logging.getLogger("megatron_omega")
    was_propagated, package.propagate = package.propagate, True
    try:
        with caplog.at_level(logging.INFO, logger="megatron_omega"):
            hook.on_start(cast(Any, None))
            first = caplog.text
            for seconds in (9.0, *[0.5] * (WARM_UP_STEPS + 1)):
                hook.on_step_end(cast(Any, SimpleNamespace(step_seconds=seconds)))
            hook.on_close()
    finally:
        package.propagate = was_propagated
    assert "forecast for cpu" in first and "forecast of memory" in first
    last = caplog.messages[-1]
    assert f"median step 0.5 s (forecast {estimate.step_seconds:.3g})" in last
    assert f"rank 0 1 GiB (forecast {estimate.ranks[0].total / 2**30:.3g}" in last


def test_memory_that_is_touched_raises_the_peak() -> None:
    before = peak_bytes()
    held = np.ones(2 * before, dtype=np.uint8)  # more than was ever given back below the peak
    assert peak_bytes() >= held.nbytes > before
