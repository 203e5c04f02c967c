"""A real little corpus with its tokenizer, a run of omega-tiny on it, and scripts run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class TinyCorpus:
    """A corpus of real text, made by the project's own tools."""

    text: Path
    tokenizer: Path
    prefix: Path
    run_yaml: Path
    """omega-tiny with short streams on this corpus."""


def run_python(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository with this interpreter."""
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )


def make_tiny_corpus(folder: Path) -> TinyCorpus:
    """Make the corpus in `folder`."""
    text, tokenizer, prefix = folder / "text.jsonl", folder / "tokenizer.model", folder / "text"
    commands = [
        ["-m", "megatron_omega", "gather-text", "--output", text, "--megabytes", "2", "--standard-library"],
        ["tools/train_tokenizer.py", "--input", text, "--output", tokenizer, "--vocab-size", "1000"],
        ["tools/preprocess_data.py", "--input", text, "--output-prefix", prefix, "--json-keys", "text",
         "--tokenizer-model", tokenizer, "--append-eod", "--workers", "1"],
    ]  # fmt: skip
    for command in commands:
        done = run_python(*command)
        assert done.returncode == 0, done.stderr
    run = yaml.safe_load((ROOT / "examples/omega-tiny/run.yaml").read_text())
    run["model"] |= {"vocab_size": 1000}
    run["data"] |= {
        "tokenizer": str(tokenizer), "corpora": [{"prefix": f"{prefix}_text_document"}],
        "encoder_seq_length": 64, "decoder_seq_length": 64,
    }  # fmt: skip
    run["batch"] = {"micro_batch_size": 1, "global_batch_size": 8}
    run["parallel"] = {"recompute": "none"}
    run_yaml = folder / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(run))
    return TinyCorpus(text, tokenizer, Path(f"{prefix}_text_document"), run_yaml)
