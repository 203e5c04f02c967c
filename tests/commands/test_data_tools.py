"""The data tools as a user calls them: exit codes, one line for a mistake, and nothing lost when they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TEXTS = [f"document {number}: " + " ".join(f"word{number * k % 97}" for k in range(40)) for number in range(200)]


def call(tool: str, *arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(ROOT / tool), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer and its shard, made by the tools."""
    folder = tmp_path_factory.mktemp("tools")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "corpus.jsonl").write_text(lines)
    made = call(
        "tools/train_tokenizer.py",
        "--input",
        folder / "corpus.jsonl",
        "--output",
        folder / "t.model",
        "--vocab-size",
        450,
    )
    assert made.returncode == 0, made.stderr
    made = preprocess(folder, "out", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["documents"] == 200
    return folder


def preprocess(
    folder: Path, name: str, *arguments: object, source: object = None
) -> subprocess.CompletedProcess[bytes]:
    source = source or folder / "corpus.jsonl"
    settings = (
        "--output-prefix",
        folder / name,
        "--tokenizer-model",
        folder / "t.model",
        "--append-eod",
        "--workers",
        1,
    )
    stdin = (folder / "corpus.jsonl").read_bytes() if source == "-" else b""
    return call("tools/preprocess_data.py", "--input", source, *settings, *arguments, stdin=stdin)


def test_stdin_gives_the_same_bytes(folder: Path) -> None:
    assert preprocess(folder, "stdin", source="-").returncode == 0
    for suffix in ("bin", "idx"):
        assert (folder / f"stdin_text_document.{suffix}").read_bytes() == (
            folder / f"out_text_document.{suffix}"
        ).read_bytes()


def test_killed_at_many_moments_it_ends_with_the_same_bytes(folder: Path) -> None:
    """A tracer kills the tool at its n-th audit event of a kind, so that every stage is hit without any clock."""
    killer = (
        "import os, runpy, signal, sys\n"
        "limit, seen, parent = int(sys.argv.pop(1)), 0, os.getpid()\n"
        "def hook(event, _):\n"
        "    global seen\n"
        "    if event in ('open', 'os.rename', 'os.remove') and os.getpid() == parent:\n"
        "        seen += 1\n"
        "        if seen == limit: os.kill(parent, signal.SIGKILL)\n"
        "sys.argv = sys.argv[1:]\n"
        "import tqdm, sentencepiece, numpy, megatron_omega.corpus.preprocess, megatron_omega.corpus.reading.hugging_face\n"
        "sys.addaudithook(hook)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = [
        "--input",
        folder / "corpus.jsonl",
        "--output-prefix",
        folder / "killed",
        "--tokenizer-model",
        folder / "t.model",
    ]
    arguments += ["--append-eod", "--workers", "1", "--chunk-megabytes", "0.02"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    codes: list[int] = []
    for limit in [*range(12, 150, 18), 10**9]:
        command = [
            sys.executable,
            "-c",
            killer,
            str(limit),
            str(ROOT / "tools/preprocess_data.py"),
            *map(str, arguments),
        ]
        codes.append(subprocess.run(command, capture_output=True, env=environment, check=False).returncode)
        if codes[-1] != 0:
            assert codes[-1] == -signal.SIGKILL
            assert not (folder / "killed_text_document.idx").exists() or (folder / "killed_text_document.json").exists()
    assert codes[-1] == 0 and codes.count(-signal.SIGKILL) >= 3
    for suffix in ("bin", "idx", "sums"):
        assert (folder / f"killed_text_document.{suffix}").read_bytes() == (
            folder / f"out_text_document.{suffix}"
        ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input", "nowhere.jsonl"], 3, "names no file"),
        (["--input", "{}/corpus.jsonl", "--json-keys", "body"], 3, "key 'body' missing"),
        (["--input", "{}/corpus.jsonl", "--tokenizer-model", "none.model"], 3, "none.model cannot be read"),
        (["--input", "{}/corpus.jsonl", "--shard", "3/3"], 2, "--shard 3/3"),
        (["--input", "{}/corpus.jsonl", "--dataset", "x"], 2, "either --input or --dataset"),
        (["--dataset", "{}/saved", "--dataset-split", "dev"], 3, "has no split 'dev'; it has train"),
    ],
)
def test_a_mistake_is_one_line(folder: Path, arguments: list[str], code: int, message: str) -> None:
    (folder / "saved").mkdir(exist_ok=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    defaults = ["--output-prefix", str(folder / "bad"), "--tokenizer-model", str(folder / "t.model"), "--workers", "1"]
    result = call("tools/preprocess_data.py", *defaults, *(argument.format(folder) for argument in arguments))
    assert result.returncode == code
    assert message in result.stderr.decode() and result.stderr.count(b"\n") == 1 and result.stdout == b""


def test_inspecting_and_damage(folder: Path) -> None:
    shown = call("tools/inspect_data.py", folder / "out_text_document", "--show", 17)
    assert TEXTS[17] in shown.stdout.decode() and b"corpus.jsonl:18" in shown.stdout
    picture = folder / "lengths.png"
    found = call("tools/inspect_data.py", folder / "out_text_document", "--check", "--json", "--histogram", picture)
    assert found.returncode == 0 and json.loads(found.stdout)["check"] == "passed"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for suffix in ("bin", "idx", "sums", "json"):
        data = bytearray((folder / f"out_text_document.{suffix}").read_bytes())
        if suffix == "bin":
            data[1000] ^= 4
        (folder / f"bad_shard.{suffix}").write_bytes(data)
    damaged = call("tools/inspect_data.py", folder / "bad_shard", "--check")
    assert damaged.returncode == 3 and b"bad_shard.bin is damaged between bytes 0 and" in damaged.stderr
    assert damaged.stderr.count(b"\n") == 1


def test_a_shard_may_be_named_by_its_files(folder: Path) -> None:
    for name in ("out_text_document", "out_text_document.bin", "out_text_document.idx"):
        shown = call("tools/inspect_data.py", folder / name)
        assert shown.returncode == 0 and b"documents  200" in shown.stdout and b"{" not in shown.stdout


def test_an_earlier_merge_is_not_merged_with_its_parts(folder: Path, tmp_path: Path) -> None:
    for part in ("a", "b"):
        assert preprocess(folder, str(tmp_path / part)).returncode == 0
    first = call("tools/merge_shards.py", "--input", tmp_path, "--output-prefix", tmp_path / "all", "--json")
    again = call("tools/merge_shards.py", "--input", tmp_path, "--output-prefix", tmp_path / "again", "--json")
    assert json.loads(again.stdout)["documents"] == json.loads(first.stdout)["documents"] == 400
    assert b"left out: " in again.stderr and b"all is an earlier merge" in again.stderr
    itself = call("tools/merge_shards.py", "--input", tmp_path / "a", "--output-prefix", tmp_path / "a")
    assert itself.returncode == 3 and b"one of --input" in itself.stderr


def test_what_a_run_read_and_when(folder: Path) -> None:
    config = {
        "model": {
            "encoder_layers": 1,
            "decoder_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "axial_width": 16,
        },
        "data": {
            "tokenizer": str(folder / "t.model"),
            "corpora": [{"prefix": str(folder / "out_text_document")}],
            "encoder_seq_length": 256,
            "decoder_seq_length": 256,
        },
        "batch": {"micro_batch_size": 1, "global_batch_size": 4},
        "training": {"train_steps": 30},
        "schedule": {"warmup_steps": 5},
    }
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    seen = call("tools/inspect_data.py", "--run", folder / "run", "--step", 3, "--data-parallel-size", 2, "--json")
    assert seen.returncode == 0, seen.stderr
    examples = [json.loads(line) for line in seen.stdout.splitlines()]
    assert {(one["rank"], one["sample"]) for one in examples} == {(0, 8), (0, 10), (1, 9), (1, 11)}
    document = examples[0]["origin"]["document"]
    assert examples[0]["source"].endswith(f"corpus.jsonl:{document + 1}")
    found = call("tools/inspect_data.py", "--run", folder / "run", "--find", document, "--json")
    assert {"step": 3, "sample": 8} in json.loads(found.stdout)["seen"]


def test_tools_start_without_torch(folder: Path) -> None:
    for tool in ("preprocess", "train_tokenizer", "merge_shards", "inspect_data"):
        code = f"import sys, megatron_omega.commands.{tool}; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0, tool
