"""What version 0.1 wrote is loaded, continued, and means the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT

from megatron_omega.config.load import load_config
from megatron_omega.export.loading import load_text_model
from megatron_omega.generation.decoding import generate
from megatron_omega.generation.sampling import Sampling

WRITTEN = Path(__file__).parent / "written_by_0_1"
WRITES = [341, 418, 418, 418, 418, 418, 418, 418]
"""What that version wrote after the prompt."""

SRUN = """#!/usr/bin/env bash
# Stands in for Slurm's: one task, on this host.
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
exec "$@"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with the old files in it, and a stand-in for srun."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    for name in ("tools", "ds_configs", "megatron_omega", "pretrain_omega.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f"PATH={Path(sys.executable).parent}:$PATH")
    return tmp_path


def losses(path: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: row["lm_loss"] for row in rows}


@pytest.mark.distributed
def test_the_script_starts_the_run_again_which_goes_on_as_it_did_then(folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = ["bash", "slurm.sbatch"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run/SUCCESS").exists()
    expected, found = losses(WRITTEN / "metrics.jsonl"), losses(folder / "run/metrics.jsonl")
    assert {step: found[step] for step in (3, 4)} == pytest.approx({step: expected[step] for step in (3, 4)}, abs=1e-5)


def test_a_stored_configuration_means_what_it_meant() -> None:
    config = load_config(WRITTEN / "run/config.yaml")
    assert config.model.parametrization == 1
    assert config.model.decoder_start == "begin"
    assert config.objective.mlm_weighing == "means"


@pytest.mark.parametrize("place", ["export", "run"])
def test_an_export_and_a_checkpoint_write_text(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = load_text_model(folder / place)
    ids = generate(model, "the quick brown", Sampling(temperature=0.0), max_new_tokens=8, seed=1)
    assert list(ids) == WRITES


def test_the_page_of_an_export_tells_a_path_that_exists() -> None:
    """The code that its README shows imports from a module that has moved since."""
    text = (WRITTEN / "export/README.md").read_text()
    (line,) = [line.strip() for line in text.splitlines() if line.strip().startswith("from megatron_omega")]
    found: dict[str, object] = {}
    exec(line, found)
    assert callable(found["load_omega"])
