"""A start that is refused, for whatever reason, leaves the disk as it was: no new folder, no changed file."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from hostile.attacks import write_targets
from hostile.trials import run_command
from written_models import write_run

REFUSALS = {
    "a setting": (["--model.hidden_size", "7"], 2),
    "a window": (["--model.local_window", "999"], 2),
    "a full batch": (["--batch.global_batch_size", "3", "--batch.micro_batch_size", "2"], 2),
    "a shard": (["--data.corpora", '[{"prefix": "/nowhere"}]'], 3),
    "a tokenizer": (["--data.tokenizer", "/nowhere"], 3),
    "another tokenizer": (["--data.tokenizer", "{good}/a.jsonl"], 3),
    "a checkpoint": (["--checkpoint.load", "/nowhere"], 4),
    "another model": (["--checkpoint.load", "{good}/run", "--model.hidden_size", "64"], 4),
    "no validation": (["--evaluation.interval_steps", "10"], 2),
}
GOOD = ("--data.tokenizer={good}/tokenizer.model", '--data.corpora=[{{"prefix": "{good}/shards/t_text_document"}}]',
        "--data.split=[1, 0, 0]", "--evaluation.interval_steps=0", "--training.train_steps=5", "--precision.dtype=fp32",
        "--data.encoder_seq_length=96", "--data.decoder_seq_length=96")  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "good"
    write_targets(folder)
    importlib.import_module("megatron_omega.run.train")  # once, not in each start
    return folder


def snapshot(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return every file with its content and time, and every folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else (0, b"") for path in folder.rglob("*")
    }


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("refusal", REFUSALS)
def test_nothing_is_left_and_nothing_changed(refusal: str, good: Path, tmp_path: Path) -> None:
    words, code = REFUSALS[refusal]
    used = tmp_path / "runs" / "used"
    write_run(used)
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "SUCCESS"):
        (used / name).write_text("as it was")
    (tmp_path / "elsewhere").mkdir()
    before = snapshot(tmp_path / "runs")
    for folder in (used, tmp_path / "runs" / "new" / "one"):
        command = ["train", "--config", good / "run.yaml", "--logging.run_directory", folder]
        command += [word.format(good=good) for word in GOOD] + [word.replace("{good}", str(good)) for word in words]
        outcome = run_command(command, tmp_path / "elsewhere", 60)
        assert outcome.end == code, outcome.output
        assert snapshot(tmp_path / "runs") == before
