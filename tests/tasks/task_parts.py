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


def write_t5(folder: Path, tokenizer: Path) -> Path:
    """A tiny T5 of Transformers, with a tokenizer of the same kind."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=420, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **ids)
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
