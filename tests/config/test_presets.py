"""The presets in examples/: readable, runnable on what their scripts ask for, and as large as they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from megatron_omega.accounting import parameter_count
from megatron_omega.config import check
from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
PRESETS = sorted(path.parent.name for path in EXAMPLES.glob("*/run.yaml"))
WHOLE = 11_934_059_264
SIZES = {"omega-125m": 125e6, "omega-1b": 1e9, "omega-11.9b": WHOLE, "omega-11.9b-hd32": WHOLE}


def preset(name: str) -> RunConfig:
    return load_config(EXAMPLES / name / "run.yaml")


def script_ranks(name: str) -> int:
    """Return the processes that a preset's Slurm script starts."""
    text = (EXAMPLES / name / "slurm.sbatch").read_text()
    nodes, tasks = (re.search(rf"--{option}=(\d+)", text) for option in ("nodes", "ntasks-per-node"))
    assert nodes and tasks
    return int(nodes[1]) * int(tasks[1])


def test_the_presets_are_complete() -> None:
    assert {*PRESETS} >= {*SIZES, "omega-tiny", "llama-like", "t5-like"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_on_what_its_script_asks_for(name: str) -> None:
    config = preset(name)
    assert check.findings(config, script_ranks(name), zero_stage=1) == []
    assert check.notices(config) == []
    assert config.logging.run_directory == f"runs/{name}"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_scripts(name: str) -> None:
    folder = EXAMPLES / name
    assert (folder / "README.md").read_text().startswith(f"# {name}\n")
    for script in ("run.sh", "slurm.sbatch"):
        text = (folder / script).read_text()
        assert text.startswith("#!/usr/bin/env bash\n") and f"examples/{name}" in text
        assert subprocess.run(["bash", "-n", folder / script], capture_output=True).returncode == 0
    assert (folder / "run.sh").stat().st_mode & 0o111


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_preset_is_as_large_as_its_name(name: str, size: float) -> None:
    assert parameter_count(preset(name).model) == pytest.approx(size, rel=0.02 if size < WHOLE else 0)


@pytest.mark.parametrize("name", ["omega-125m", "omega-1b"])
def test_smaller_presets_keep_the_proportions(name: str) -> None:
    model, whole = preset(name).model, preset("omega-11.9b").model
    assert model.ffn_hidden_size / model.hidden_size == whole.ffn_hidden_size / whole.hidden_size
    assert model.resolved_head_dim == whole.resolved_head_dim


@pytest.mark.parametrize("name", ["llama-like", "t5-like"])
def test_comparison_presets_match_omega_tiny(name: str) -> None:
    tiny, other = preset("omega-tiny"), preset(name)
    assert parameter_count(other.model) == pytest.approx(parameter_count(tiny.model), rel=0.01)
    for section in ("batch", "optimizer", "schedule", "training", "precision", "parallel"):
        assert getattr(other, section) == getattr(tiny, section)
    assert sum_lengths(other) == sum_lengths(tiny)


def sum_lengths(config: RunConfig) -> int:
    return config.data.encoder_seq_length + config.data.decoder_seq_length
