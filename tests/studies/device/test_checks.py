"""Checks of a device pass on a CPU, and each of them fails when its fault is planted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_omega.commands import check_device
from megatron_omega.engine import engine as engine_module
from megatron_omega.errors import ConfigError
from megatron_omega.health import weights
from megatron_omega.model import attention, documents, stream
from megatron_omega.parallel import lean, tensor_parallel
from megatron_omega.studies.device import checks, numerics, ranks, speed, training
from megatron_omega.studies.device.findings import Finding, LeftOut, Setting, until_failure
from megatron_omega.studies.device.recording import AttentionKernels

HERE = Setting()


def failures(findings: Iterator[Finding | LeftOut]) -> list[str]:
    return [str(finding) for finding in findings if not finding.passed]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "LENGTHS", {"ragged": [70, 3, 60]})


# ---- in this process


@pytest.mark.usefixtures("short")
def test_kernels_agree_with_their_definitions() -> None:
    assert failures(numerics.check_branches(HERE)) == []
    assert failures(numerics.check_functions(HERE)) == []


@pytest.mark.usefixtures("short")
def test_a_dense_mask_where_documents_are_known_is_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_takes_spans", lambda _: False)
    found = failures(numerics.check_branches(HERE))
    assert found and all("kernels that should not run" in line and "a mask" in line for line in found)


@pytest.mark.usefixtures("short")
def test_scores_computed_one_by_one_are_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def spelled_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + mask).softmax(dim=-1) @ value

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spelled_out)
    found = failures(numerics.check_branches(HERE))
    assert found and all("no fused kernel" in line for line in found)


@pytest.mark.parametrize("branch", ["full", "axial"])
def test_wrong_kernels_of_a_gpu_are_named(branch: Any) -> None:
    """What a GPU's dispatcher would show, judged here."""
    gpu = Setting("cuda")
    bounds = replace(numerics.select_kernels("cpu"), variable_length_attention=lambda *_: torch.ones(()))
    judge = partial(numerics.wrong_kernels, branch=branch, dtype=torch.bfloat16, setting=gpu, kernels=bounds)
    right = {"_varlen_attn"} if branch == "full" else {"_scaled_dot_product_efficient_attention masked"}
    assert judge(right) == ""
    assert "cuDNN" in judge({"_scaled_dot_product_cudnn_attention masked"})
    assert judge({"_varlen_attn"} if branch == "axial" else {"_scaled_dot_product_efficient_attention masked"})


@pytest.mark.usefixtures("short")
def test_a_wrong_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = documents._flash
    monkeypatch.setattr(documents, "_flash", lambda query, *rest, **options: flash(1.01 * query, *rest, **options))
    found = failures(numerics.check_branches(HERE))
    assert found and all("at most 2e-05" in line for line in found)


def test_a_wrong_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    normalise = lean._normalise
    monkeypatch.setattr(lean, "_normalise", lambda hidden, weight, _: normalise(hidden, weight, 1e-3))
    found = failures(numerics.check_functions(HERE))
    assert any("RMSNorm" in line for line in found) and not any("SwiGLU" in line for line in found)


def test_a_result_that_is_no_number_fails() -> None:
    assert not Finding("x", "y", math.nan, 1.0).passed
    assert not Finding("x", "y", 0.5, 1.0, is_floor=True).passed and Finding("x", "y", 0.5, 1.0).passed


def test_everything_computes_on_the_device() -> None:
    assert failures(training.check_placement(HERE)) == []


def test_an_operation_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_host(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
        shape = (*positions.shape, head_dim)
        return torch.zeros(shape, device="cpu").to("meta"), torch.ones(shape, device="meta")

    monkeypatch.setattr(stream, "rotary_table", on_the_host)
    [line] = failures(training.check_placement(HERE))
    assert "zeros" in line


def test_memory_is_what_the_planner_says_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(speed.check_memory(HERE)) == []
    planned = speed.encoder_layer
    monkeypatch.setattr(speed, "encoder_layer", lambda *arguments: planned(*arguments) + 1)
    [line] = failures(speed.check_memory(HERE))
    assert "encoder" in line


def test_what_messages_keep_waiting_is_told_from_what_they_hide_behind() -> None:
    kernels = [("gemm", 0.0, 2.0), ("ncclDevKernel_AllReduce", 1.0, 4.0), ("softmax", 3.0, 3.5)]
    assert speed.exposed_seconds(kernels) == 1.5
    assert speed.exposed_seconds(kernels[:1]) == 0.0


def test_layers_are_timed_and_only_told_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    [finding] = list(speed.check_layers(HERE))
    assert isinstance(finding, Finding) and finding.limit is None and 0.01 < finding.value < 100


# ---- the command


def test_the_first_failure_ends_the_checking_and_everything_is_in_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def three(_: Setting) -> Iterator[Finding]:
        yield Finding("made-up", "first", 1.0, 2.0)
        yield Finding("made-up", "second", 3.0, 2.0)
        raise AssertionError("went on")

    monkeypatch.setitem(checks.CHECKS, "made-up", three)
    file = tmp_path / "found.json"
    assert check_device.main(["--device", "cpu", "--only", "made-up", "--json", str(file)]) == 1
    assert [entry["status"] for entry in json.loads(file.read_text())] == ["PASS", "FAIL"]
    assert "FAIL  made-up: second: 3, at most 2" in capsys.readouterr().out
    assert check_device.main(["--device", "cpu", "--only", "device"]) == 0


def test_a_check_that_breaks_off_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Setting) -> Iterator[Finding]:
        yield Finding("made-up", "first", 1.0, 2.0)
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(checks.CHECKS, "made-up", broken)
    [line] = failures(checks.every_finding(HERE, ["made-up"]))
    assert "RuntimeError: no kernel image is available" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "kernels"], "there is no check 'kernels'"),
        (["--gpus", "3"], "cannot be halved"),
        (["--device", "cuda", "--gpus", "64"], "usable GPUs"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_device.main(words)


# ---- in ranks: a setting's `prepare` plants the fault


def _waiting() -> None:
    """Let every norm wait for the device."""
    normalise = lean._normalise

    def waits(hidden: Tensor, weight: Tensor, epsilon: float) -> Any:
        weight.sum().item()
        return normalise(hidden, weight, epsilon)

    lean._normalise = waits


def _scaled() -> None:
    """Weigh the loss of a batch a little too much."""
    weighted = engine_module.Engine._weighted
    engine_module.Engine._weighted = lambda self, batches, counts: weighted(self, batches, 0.999 * counts)


def _forgetful() -> None:
    """Load a checkpoint, but not the moments."""
    load = training.CheckpointStore.load_latest

    def forget(self: Any, engine: Any, **options: Any) -> Any:
        state = load(self, engine, **options)
        for moments in engine.deepspeed.optimizer.optimizer.state.values():
            moments["exp_avg"].zero_()
        return state

    training.CheckpointStore.load_latest = forget


def _too_much() -> None:
    """Leave every block with a little too much."""
    leave = tensor_parallel.TensorParallel.leave
    tensor_parallel.TensorParallel.leave = lambda self, partial: 1.001 * leave(self, partial)


def _misnaming() -> None:
    """Name another rank than the one that is wrong."""
    weights.odd_ones = lambda copies: (
        [next(copy for copy in copies if copy.rank == 0)] if len({*copies.values()}) > 1 else []
    )


def _mute() -> None:
    """Let an all-reduce add nothing."""
    ranks.dist.all_reduce = lambda *_, **__: None


def _standing() -> None:
    """Train without moving."""
    train_step = engine_module.Engine.train_step
    engine_module.Engine.train_step = lambda self, batches, **_: train_step(
        self, iter([next(batches)] * 99), learning_rate=0.0
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("check", "fault", "said"),
    [
        (training.check_waits, _waiting, "among micro-batches"),
        (training.check_losses, _scaled, "relative to fp64"),
        (training.check_resume, _forgetful, "losses, those that differ"),
        (ranks.check_groups, _mute, "wrong results"),
        (ranks.check_layouts, _too_much, "relative to fp64"),
        (ranks.check_faults, _misnaming, "do not name rank 1"),
        (speed.check_steps, _standing, "of the first"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_fails_its_check(check: Any, fault: Any, said: str) -> None:
    *_, last = until_failure(check(replace(HERE, prepare=fault)))
    assert not last.passed and said in str(last)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["waits", "losses", "resume", "groups", "layouts", "faults", "steps"])
def test_a_check_passes_on_this_machine(name: str) -> None:
    assert failures(checks.every_finding(HERE, [name])) == []


def test_kernels_are_seen_with_their_masks() -> None:
    part = torch.randn(1, 1, 8, 8)
    with AttentionKernels() as plain:
        torch.nn.functional.scaled_dot_product_attention(part, part, part)
    with AttentionKernels() as masked:
        torch.nn.functional.scaled_dot_product_attention(part, part, part, attn_mask=torch.zeros(1, 1, 8, 8))
    assert not any(name.endswith("masked") for name in plain.names)
    assert all(name.endswith("masked") for name in masked.names)
