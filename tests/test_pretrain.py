"""What a user's mistakes cost: one clear message, the right exit code, no traceback, no process group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from tiny import ROOT, TinyCorpus, run_python

import pretrain_omega
from megatron_omega.engine.start import accelerator
from megatron_omega.launching.local_ranks import free_port

ZERO = ROOT / "ds_configs"


def run(
    corpus: TinyCorpus,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *words: object,
    world: int = 1,
) -> tuple[int, str]:
    """Call the entry point as rank 0 of `world`; return its exit code and what it said."""
    place = {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    own = ["--config", str(corpus.run_yaml), "--logging.run_directory", str(corpus.run_yaml.parent / "refused")]
    with pytest.raises(SystemExit) as ended:  # in a folder of its own: the checkout may hold the demo's finished run
        pretrain_omega.main([*own, *(str(word) for word in words)])
    assert not dist.is_initialized()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return int(str(ended.value.code)), said


CONFIGURATION = {
    "heads": (["--parallel.tensor_parallel_size", "5"], 5, ["num_attention_heads=6", "tensor_parallel_size=5"]),
    "ffn": (
        ["--parallel.tensor_parallel_size", "3", "--model.ffn_hidden_size", "100"], 3, ["ffn_hidden_size=100"],
    ),
    "zero-3 and stages": (
        ["--deepspeed_config", ZERO / "zero3.json", "--parallel.pipeline_parallel_size", "2"], 2, ["stage", "pipeline"],
    ),
    "window": (["--model.local_window", "8"], 1, ["local_window=8", "axial_width=16"]),
    "batch": (["--batch.global_batch_size", "7", "--batch.micro_batch_size", "2"], 2, ["global_batch_size=7"]),
    "fp16 on a CPU": (["--precision.dtype", "fp16", "--training.train_steps", "20"], 1, ["fp16", "fp32 or bf16"]),
    "typo": (["--model.hiden_size", "64"], 1, ["model.hiden_size", "did you mean model.hidden_size"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATION)
def test_configuration_errors(
    case: str, tiny_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, world, expected = CONFIGURATION[case]
    monkeypatch.setattr(type(accelerator()), "is_fp16_supported", lambda self: False)  # some processors can
    code, said = run(tiny_corpus, capsys, monkeypatch, *words, world=world)
    assert code == 2
    assert all(part in said for part in expected), said


def test_all_configuration_errors_at_once(
    tiny_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model.local_window", "8", "--model.hiden_size", "64", "--parallel.tensor_parallel_size", "5"]
    code, said = run(tiny_corpus, capsys, monkeypatch, *words, world=5)
    assert code == 2 and all(part in said for part in ("hiden_size", "local_window=8", "num_attention_heads=6"))


def test_missing_tokenizer(
    tiny_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    missing = tmp_path / "nowhere.model"
    code, said = run(tiny_corpus, capsys, monkeypatch, "--data.tokenizer", missing)
    assert code == 3 and str(missing) in said and len(said.splitlines()) == 1


def test_empty_corpus(tmp_path: Path, tiny_corpus: TinyCorpus) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    arguments = ["--output-prefix", tmp_path / "out", "--tokenizer-model", tiny_corpus.tokenizer, "--append-eod"]
    done = run_python("tools/preprocess_data.py", "--input", empty, "--json-keys", "text", *arguments)
    assert done.returncode == 3 and "Traceback" not in done.stderr, done.stderr
    assert "holds no record" in done.stderr


def test_json_line_without_the_key(tmp_path: Path, tiny_corpus: TinyCorpus) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n{"body": "two"}\n')
    arguments = ["--output-prefix", tmp_path / "out", "--tokenizer-model", tiny_corpus.tokenizer, "--append-eod"]
    done = run_python("tools/preprocess_data.py", "--input", text, "--json-keys", "text", *arguments)
    said = done.stderr + done.stdout
    assert done.returncode == 3 and "Traceback" not in said and "text.jsonl" in said, said


@pytest.mark.parametrize("text", ["", '{"body": "two"}\n'])
def test_no_text_for_a_tokenizer(text: str, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(text)
    arguments = ["--input", tmp_path / "text.jsonl", "--output", tmp_path / "tokenizer.model"]
    done = run_python("tools/train_tokenizer.py", *arguments)
    assert done.returncode == 3 and done.stderr.startswith("error: the input holds no text (key text)"), done.stderr


def test_a_run_folder_that_cannot_be_written(
    tiny_corpus: TinyCorpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    code, said = run(
        tiny_corpus, capsys, monkeypatch, "--logging.run_directory", blocked / "run", "--training.train_steps", "20"
    )
    assert code == 2 and "run_directory" in said


def test_dry_run_of_a_preset_needs_no_corpus() -> None:
    done = run_python("pretrain_omega.py", "--config", "examples/omega-11.9b/run.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "11,934,059,264" in done.stdout
    assert yaml.safe_load((ROOT / "examples/omega-11.9b/run.yaml").read_text())["model"]["hidden_size"] == 960
