"""Questions about nothing, for models that know nothing: records, task files, and a model on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from written_models import TEXT, tiny_config, tiny_model, tiny_tokenizer, write_run

from megatron_omega.export.loading import TextModel

DECODER_ONLY: dict[str, dict[str, Any]] = {
    "model": {"encoder_layers": 0}, "data": {"encoder_seq_length": 0},
    "objective": {"prefix_lm": 1.0, "span_corruption": 0.0, "masked_prefix": 0.0},
}  # fmt: skip
WORDS = "".join(TEXT[:1] + TEXT[-1:]).split()


def text_model(**sections: dict[str, Any]) -> TextModel:
    config = tiny_config(**sections)
    return TextModel(tiny_model(config), config, tiny_tokenizer(), Path("tiny"))


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with four choices each; the right one is any."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        options = [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) + f" {letter}" for letter in "abcd"]
        right = draw.randrange(4)
        question = f"{number}: " + " ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "?"
        found.append({"question": question, "options": options, "answer": options[right], "gold": right})
    return found


def write_records(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return path


def write_tasks(folder: Path, **more: Any) -> Path:
    """Write a task of 12 training and 10 held-out questions; `more` are settings of it."""
    task = {
        "path": str(write_records(folder / "train.jsonl", records(12, 1))),
        "validation": str(write_records(folder / "held.jsonl", records(10, 2))),
        "name": "quiz", "prompt": "{question}", "target": " {answer}", "choices": [" {options}"], **more,
    }  # fmt: skip
    path = folder / "tasks.yaml"
    path.write_text(yaml.safe_dump([task]))
    return path


def write_model_folder(folder: Path, **sections: dict[str, Any]) -> Path:
    write_run(folder, None, **sections)
    return folder
