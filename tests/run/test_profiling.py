"""A trace of some steps: what is named in it, that nothing is left behind, and that it changes no loss."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import replica_batches, small_config, start_engine

from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.run.profiling import profiling_hooks
from megatron_omega.training.state import StepReport

pytestmark = pytest.mark.distributed
STEPS = 4


def _traced(folder: Path, parallel: dict[str, Any], *, is_traced: bool) -> tuple[list[float], list[str]]:
    """Train some steps, the middle two of them traced on rank 0; return losses and the files left behind."""
    training = {"profile_steps": [2, 3]} if is_traced else {}
    config = small_config(parallel=parallel, training=training, logging={"run_directory": str(folder)})
    engine = start_engine(config)
    hooks, batches, losses = profiling_hooks(config, engine), replica_batches(config, engine), []
    assert len(hooks) == (is_traced and engine.topology.rank == 0)
    for step in range(1, STEPS + 1):
        for hook in hooks:
            hook.on_step_begin(step)
        losses.append(engine.train_step(batches, learning_rate=1e-3).loss)
        for hook in hooks:
            hook.on_step_end(_report(step))
    for hook in hooks:
        hook.on_close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in _layers(engine.module))
    return losses, [path.name for path in (folder / "traces").glob("*")]


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ in ("EncoderLayer", "DecoderLayer")]


def _report(step: int) -> StepReport:
    report = object.__new__(StepReport)
    object.__setattr__(report, "step", step)
    return report


def _names(path: Path) -> set[str]:
    return {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if "name" in event}


LAYERS = {"layer encoder.layers.0", "layer decoder.layers.1", "layer encoder.layers.1 backward", "layer head"}
BRANCHES = {"branch full + dynamic", "branch axial", "branch causal", "branch cross"}


@pytest.mark.parametrize(
    ("ranks", "parallel", "wanted"),
    [
        (1, {}, LAYERS | BRANCHES | {"stage 0 forward", "stage 0 backward", "stage 0 optimizer"}),
        (
            2,
            {"pipeline_parallel_size": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
            {"stage 0 forward", "stage 2 backward", "layer encoder.layers.0", "branch full + dynamic"},
        ),
        (2, {"tensor_parallel_size": 2}, LAYERS | BRANCHES | {"message tensor all_reduce"}),
    ],
    ids=["alone", "interleaved", "tensor-parallel"],
)
def test_a_trace_names_what_it_shows(ranks: int, parallel: dict[str, Any], wanted: set[str], tmp_path: Path) -> None:
    [(losses, files), *_] = run_ranks(_call, ranks, tmp_path, parallel, True, timeout_seconds=120)
    assert files == ["steps-2-3-rank-0.json.gz"]
    names = _names(tmp_path / "traces" / files[0])
    assert wanted <= names, wanted - names
    if ranks == 1:
        [(plain, none)] = run_ranks(_call, 1, tmp_path / "plain", parallel, False, timeout_seconds=120)
        assert losses == plain and none == []


def _call(folder: Path, parallel: dict[str, Any], is_traced: bool) -> Any:
    return _traced(folder, parallel, is_traced=is_traced)
