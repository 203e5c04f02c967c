"""A dry run tells the truth about every preset, and starts at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_omega import accounting
from megatron_omega.config.arguments import Arguments, Override, parse_arguments
from megatron_omega.config.load import ResolvedRun, load_config, resolve_run
from megatron_omega.host.environment import announced_world_size
from megatron_omega.run.preview import Preview, describe

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "examples").glob("*/run.yaml"))


def resolved(preset: str = "omega-tiny", world_size: int | None = None, **settings: str) -> ResolvedRun:
    overrides = tuple(Override(name.replace("__", "."), text) for name, text in settings.items())
    return resolve_run(Arguments(ROOT / "examples" / preset / "run.yaml", overrides=overrides), world_size)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.parent.name)
def test_every_preset_is_described(path: Path, tmp_path: Path) -> None:
    run = resolve_run(Arguments(path))
    text = describe(run)
    (tmp_path / "run.yaml").write_text(text.split("# DeepSpeed")[0])
    assert load_config(tmp_path / "run.yaml") == run.config
    data = json.loads(describe(run, as_json=True))
    assert data["deepspeed"] == run.deepspeed.values
    assert f"{data['parameters']:,} parameters" in text
    assert data["estimate"]["peak_memory_bytes"] > 0 and data["estimate"]["step_seconds"] > 0
    stages = data["layout"]["stages"]
    names = accounting.layer_names(run.config.model)
    assert [number for stage in stages for number in range(stage["first"], stage["last"] + 1)] == [*range(len(names))]
    assert sum(stage["parameters"] for stage in stages) == data["parameters"]


def test_stages_are_told_in_words() -> None:
    stages = list(Preview(resolved(parallel__stage_boundaries="[2]")).stages)
    assert [stage.layers for stage in stages] == [
        "embedding, encoder 0",
        "encoder 1, bridge, decoder 0-1, head, output",
    ]


def test_a_v_holds_two_stages_on_each_rank() -> None:
    stages = Preview(resolved(parallel__pipeline_schedule="dualpipev")).stages
    assert [stage.rank for stage in stages] == [0, 1, 1, 0]


def test_replicas_follow_from_the_processes() -> None:
    assert "TP 2 x PP 2 x DP 1 = 4 ranks" in describe(resolved())
    assert "TP 2 x PP 2 x DP 4 = 16 ranks (4 replicas), 1f1b, ZeRO-1, 1 micro-batches of 2" in describe(
        resolved(world_size=16)
    )
    assert announced_world_size({"WORLD_SIZE": "16"}) == 16
    assert announced_world_size({}) is None


def test_notices_and_what_does_not_fit_are_said() -> None:
    run = resolved()
    assert "# notices" not in describe(ResolvedRun(run.config, run.deepspeed, ()))
    assert "- mind the gap" in describe(ResolvedRun(run.config, run.deepspeed, ("mind the gap",)))
    large = resolved("omega-11.9b", parallel__pipeline_parallel_size="1")
    assert "this does not fit: h100-80g has 79.2 GiB" in describe(large)


def test_a_dry_run_needs_no_torch() -> None:
    program = (
        "import sys, pretrain_omega; "
        f"pretrain_omega.main(['--config', {str(PRESETS[0])!r}, '--dry-run', '--json']); "
        "heavy = {'torch', 'deepspeed', 'matplotlib', 'datasets'} & set(sys.modules); sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "layout" in json.loads(done.stdout)


def test_what_would_keep_it_from_starting_is_said(tmp_path: Path) -> None:
    arguments = ["--model.encoder_layers", "2", "--model.decoder_layers", "2", "--data.tokenizer", f"{tmp_path}/none.model",
                 "--data.corpora", f"[{{prefix: {tmp_path}/none}}]", "--logging.run_directory", str(tmp_path)]  # fmt: skip
    run = resolve_run(parse_arguments(["--dry-run", *arguments]))
    found = json.loads(describe(run, as_json=True))["preflight"]
    assert len(found) == 1 and f"{tmp_path}/none" in found[0]
    assert f"# preflight\n- {found[0]}" in describe(run)
