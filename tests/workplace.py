"""A folder with small files under every name that pages and help pages use, so that what they show can be run there.

Everything is named relative to the folder, so that a copy of it is as good as the folder itself.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
import zstandard
from tasks.task_parts import write_t5
from tiny import ROOT
from written_models import tiny_config, tiny_tokenizer

from megatron_omega.commands.main import main

NUM_DOCUMENTS = 5000
"""As many as the largest document number that a page names asks for."""
NUM_SHARDS = 16
CORPUS = "data/omega_text_document"
QUIZ = {
    "task": "quiz", "output_type": "multiple_choice", "dataset_path": "json", "test_split": "test",
    "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "gold", "doc_to_choice": "options",
    "metric_list": [{"metric": "acc"}],
    "dataset_kwargs": {"data_files": {"train": "questions.jsonl", "test": "questions.jsonl"}, "cache_dir": "cache"},
    "training_split": "train",
}  # fmt: skip
SHORT: dict[str, dict[str, Any]] = {
    "data": {"tokenizer": "tokenizer.model", "corpora": [{"prefix": CORPUS}], "split": [90, 5, 5]},
    "training": {"train_steps": 2},
    "schedule": {"warmup_steps": 0},
    "evaluation": {"num_batches": 1},
    "logging": {"run_directory": "runs/own", "tensorboard": False},
    "batch": {"micro_batch_size": 1, "global_batch_size": 2},
    "parallel": {"recompute": "none"},
}
"""A run of a reader's own: two steps on the little corpus."""


MORE_STEPS = ("--training.train_steps", "100", "--checkpoint.interval_steps", "50", "--optimizer.learning_rate", "0.01")
"""Enough to learn more than the frequencies of pieces, which `report` asks for."""


def call(words: Sequence[str]) -> tuple[int, str]:
    """Call a verb in this process; return its exit code and everything it said."""
    said, code = io.StringIO(), 0
    # Ranks keep where they meet in the environment; the next call is another run.
    with patch.dict(os.environ), redirect_stdout(said), redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, said.getvalue()


def made(*words: str) -> None:
    """Call a verb, which has to end well."""
    code, said = call(words)
    assert code == 0, f"{words}: {said}"


def build() -> None:
    """Fill the working directory."""
    _texts()
    _tokenizers()
    _shards()
    _questions()
    shutil.copyfile(ROOT / "megatron_omega/planner/hardware.yaml", "runs/hardware.yaml")
    _write("run.yaml", yaml.safe_dump(tiny_config(**SHORT).model_dump(mode="json")))
    _runs()
    _models()


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def _texts() -> None:
    """Write the texts of a reader: real ones, as many words as a large vocabulary needs."""
    pages = [path.read_text() for path in sorted(ROOT.glob("*/*/*.py"))]
    text = _lines([{"text": page} for page in pages])
    _write("corpus/text.jsonl", text)
    for name, compress in {
        "raw/a.jsonl.zst": zstandard.compress, "text/a.jsonl.zst": zstandard.compress, "corpus/a.jsonl.gz": gzip.compress,
    }.items():  # fmt: skip
        _write(name, "")
        Path(name).write_bytes(compress(text.encode()))
    for name in ("a.txt", "b.txt"):
        _write(name, "This function")
    for name in ("books/one.txt", "book.txt", "notes.txt"):
        _write(name, f"This function returns the list of {name}.\nA class holds two of them.\n" * 8)
    _write("notes.jsonl", _lines([{"text": "The list holds two names."}, {"text": "It is returned."}]))
    pages = ("The page names a file. " * (1 if number % 20 else 30) for number in range(NUM_DOCUMENTS))
    _write("documents.jsonl", _lines([{"text": page} for page in pages]))


def _tokenizers() -> None:
    for name in ("tokenizer.model", "corpus/tokenizer.model"):
        _write(name, "")
        Path(name).write_bytes(tiny_tokenizer().model)


def _shards() -> None:
    """Write the shards that pages name, and those that one of them joins."""
    words = ("--tokenizer-model", "tokenizer.model", "--append-eod", "--workers", "1", "--quiet")
    for prefix, text in (("data/omega", "documents.jsonl"), ("data/other", "notes.txt"), ("part", "notes.jsonl")):
        made("preprocess-data", "--input", text, "--output-prefix", prefix, *words)
    for number in range(NUM_SHARDS):
        for part in Path().glob("part_text_document*"):
            shutil.copyfile(part, f"data/omega-{number:05d}-of-{NUM_SHARDS:05d}{part.name.removeprefix('part')}")


def _runs() -> None:
    """Train a run for some steps, and put it under every name that pages have for one."""
    made("train", "--config", "run.yaml", "--logging.run_directory", "runs/omega-tiny", *MORE_STEPS)
    for name in ("omega", "t5-like"):
        shutil.copytree("runs/omega-tiny", f"runs/{name}")
    for name, step in (("PATH", 50), ("OTHER", 100)):
        shutil.copytree(f"runs/omega/checkpoints/step-{step:08d}", name)


def _questions() -> None:
    """Write pairs to learn, and questions in the format of lm-evaluation-harness."""
    pairs = [{"prompt": f"where is {number}", "target": f" {'there ' * (number % 3 + 1)}"} for number in range(30)]
    _write("pairs.jsonl", _lines(pairs))
    for path in ("tasks.yaml", "runs/tasks/tasks.yaml"):
        _write(path, yaml.safe_dump([{"path": "pairs.jsonl", "name": "where"}]))
    _write("questions.jsonl", _lines([{"question": f"What is {number}?", "options": ["a file", "a name"], "gold": number % 2}
                                      for number in range(6)]))  # fmt: skip
    for path in ("arc.yaml", "folder/of/task/files/quiz.yaml"):
        _write(path, yaml.safe_dump(QUIZ))


def _models() -> None:
    """Write what other programs and earlier commands leave: exports, adapters, and a model of Transformers."""
    made("export-hf", "--checkpoint", "runs/omega-tiny", "--output", "exports/omega-tiny")
    shutil.copytree("exports/omega-tiny", "tuned")
    made("import-hf", "--folder", "tuned", "--output", "runs/tuned/start")
    for folder, rank in (("finetuned", "0"), ("lora", "2")):
        where = ("--training.epochs", "1", "--logging.run_directory", f"runs/omega-tiny-{folder}")
        made("finetune", "--load", "runs/omega-tiny", "--tasks", "tasks.yaml", "--lora.rank", rank, *where)
    shutil.copytree("runs/omega-tiny-finetuned", "runs/functions")
    made("export-hf", "--checkpoint", "runs/omega-tiny-lora", "--adapters", "--output", "exports/adapters")
    made("import-hf", "--folder", "exports/adapters", "--base", "runs/omega-tiny", "--output", "runs/adapters")
    if importlib.util.find_spec("transformers"):
        write_t5(Path("folder/of/transformers"), Path("exports/omega-tiny/tokenizer.json"))
