"""Rates are found again in times that were made from them. On a real machine: benchmarks/real_runs.py time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_omega.planner.hardware import Hardware, find_hardware, read_hardware
from megatron_omega.planner.machine import name_in
from megatron_omega.planner.stages import layer_seconds
from megatron_omega.planner.work import Work, layer_works
from megatron_omega.studies import calibration, kernel_rates
from megatron_omega.studies.calibration import fit_latency, fit_rates
from megatron_omega.studies.kernel_rates import layer_config

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


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything be called once: what is timed counts here, not how long it took."""
    monkeypatch.setattr(kernel_rates, "PRODUCTS", [(64, 64, 64), (64, 32, 64)])
    monkeypatch.setattr(kernel_rates, "HOST_ROUNDS", 1)
    monkeypatch.setattr(kernel_rates, "best_seconds", lambda function, device: (function(), 1e-3)[1])


@pytest.mark.usefixtures("brief")
def test_a_calibrated_gpu_is_found_by_a_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is made up, and its tensors lie on the CPU; what is called is what a GPU is measured with."""
    card = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Made Up 80GB")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("product_rates", "attention_rate", "bandwidth_of", "host_seconds"):
        rate = getattr(kernel_rates, name)
        monkeypatch.setattr(calibration, name, lambda device, *rest, rate=rate: rate("cpu", *rest))
    file = calibration.calibrate("made-up", "cuda", ranks=2)
    facts = file.accelerators["made-up"]
    assert set(facts.peak_flops) == {"bf16", "fp16", "fp32"}
    assert facts.memory_gib == 80.0 and facts.per_node == 8 and not facts.is_cpu
    assert 1e-7 < facts.launch_seconds < 1e-2
    assert name_in(file, "NVIDIA Made Up 80GB") == "made-up"
    assert find_hardware("made-up", file=file).link == file.links["measured"]


@pytest.mark.usefixtures("brief")
def test_attention_and_traffic_are_timed_on_the_kernels_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    chosen = replace(
        kernel_rates.select_kernels("cpu"),
        norm=lambda *_: called.append("norm") or torch.ones(512, 256),
        gated_activation=lambda _: called.append("gate") or torch.ones(512, 1024),
    )
    monkeypatch.setattr(kernel_rates, "select_kernels", lambda _: chosen)
    monkeypatch.setattr(kernel_rates, "attend", lambda *_: called.append("attend"))
    assert kernel_rates.bandwidth_of("cpu", torch.float32) > 0
    assert kernel_rates.attention_rate("cpu", torch.float32) > 0
    assert called == ["norm", "gate", "attend"]
