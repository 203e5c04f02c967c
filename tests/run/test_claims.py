"""A run folder is one run's; a start that is refused leaves it as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import TinyCorpus, run_python

from megatron_omega.config.load import load_config
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError, OmegaError
from megatron_omega.host.lease import Holder
from megatron_omega.run.claims import HoldsFolder, claim, notice_of_completion


def config_for(folder: Path, **settings: object) -> RunConfig:
    overrides = {name.replace("__", "."): str(value) for name, value in settings.items()}
    return load_config(None, {"schedule.warmup_steps": "1", "logging.run_directory": str(folder), **overrides})


def test_a_second_start_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    lease = claim(config_for(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"in use by another start of the run \(process \d+ on "):
        claim(config_for(tmp_path / "run"))
    lease.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trace", ["metrics.jsonl", "events.jsonl", "checkpoints/step-00000001/manifest.json"])
def test_a_run_is_not_begun_inside_another(trace: str, tmp_path: Path) -> None:
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run already"):
        claim(config_for(tmp_path, checkpoint__resume=False))
    assert not list(tmp_path.glob(".lease*"))
    claim(config_for(tmp_path)).release()


def finished(folder: Path, step: int) -> None:
    (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (folder / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
    (folder / "SUCCESS").write_text(json.dumps({"step": step}))


def test_a_complete_run_says_so(tmp_path: Path) -> None:
    finished(tmp_path, 20)
    notice = notice_of_completion(config_for(tmp_path, training__train_steps=20))
    assert notice is not None and "20 steps" in notice and "training.train_steps above 20" in notice
    assert notice_of_completion(config_for(tmp_path, training__train_steps=21)) is None


@pytest.mark.parametrize("text", ["", "3", "{}", '{"step": "x"}'])
def test_a_marker_of_another_kind_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "SUCCESS").write_text(text)
    assert notice_of_completion(config_for(tmp_path, training__train_steps=20)) is None


def test_a_holder_that_was_replaced_stops(tmp_path: Path) -> None:
    class Lost:
        lost_to = Holder.this_process()

    with pytest.raises(OmegaError, match="taken its folder over"):
        HoldsFolder(Lost()).on_phase("in a step", 3)  # pyright: ignore[reportArgumentType]


def test_a_finished_run_and_a_refused_one_are_left_as_they_are(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    finished(tmp_path, 5)
    (tmp_path / "config.yaml").write_text("as it was")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    words = [
        "--config",
        tiny_corpus.run_yaml,
        "--logging.run_directory",
        tmp_path,
        "--schedule.warmup_steps",
        "1",
        "--training.train_steps",
    ]
    done = run_python("-X", "importtime", "pretrain_omega.py", *words, "5", DS_ACCELERATOR="cpu")
    assert done.returncode == 0 and "is complete: 5 steps" in done.stdout
    assert "| torch\n" not in done.stderr
    refused = run_python(
        "pretrain_omega.py", *words, "9", "--checkpoint.resume", "false", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"
    )
    assert refused.returncode == 2 and "holds a run already" in refused.stderr, refused.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_start_that_is_refused_makes_no_folder(tmp_path: Path) -> None:
    config = config_for(tmp_path / "runs" / "one", checkpoint__resume=False)
    claim(config).release()
    assert list(tmp_path.iterdir()) == []
