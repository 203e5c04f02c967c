"""A small tokenizer, some text in several languages, and configurations to read it with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_omega.config.schema import Corpus, DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainingConfig
from megatron_omega.data.indexed import token_dtype, write_shard
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "document",
    "and",
    "writes",
    "another",
    "one",
    "while",
    "rows",
    "of",
    "tokens",
    "stand",
    "beside",
    "columns",
    "of",
    "heads",
    "Größe",
    "naïve",
    "façade",
    "привет",
    "мир",
    "日本語",
    "テスト",
    "café",
    "</s>",
    "<pad>",
    "<extra_id_0>",
    "3.14159",
    "x_i",
    "+=",
    "1;",
]


def make_texts(number: int, seed: int = 0, most_words: int = 120) -> list[str]:
    """Return distinct texts with spaces, line ends and tabs in all places."""
    source = random.Random(seed)
    texts = []
    for index in range(number):
        words = [source.choice(WORDS) for _ in range(source.randint(3, most_words))]
        texts.append(
            f"{index}" + "".join(source.choice((" ", " ", " ", "  ", "\n", "\n\n", "\t")) + word for word in words)
        )
    return texts


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(texts, vocab_size=600))
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer.open(model_path)


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> str:
    """A shard of all texts, each closed by the end token."""
    path = tmp_path_factory.mktemp("shard") / "text"
    write_shard(
        path, ([*tokenizer.encode(text), tokenizer.eos_id] for text in texts), token_dtype(tokenizer.vocab_size)
    )
    return str(path)


@pytest.fixture(scope="session")
def long_prefix(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Tokenizer) -> str:
    """A shard of longer documents, as books and articles are."""
    path = tmp_path_factory.mktemp("shard") / "long"
    documents = ([*tokenizer.encode("\n".join(texts[n : n + 1 + n % 23])), tokenizer.eos_id] for n in range(len(texts)))
    write_shard(path, documents, token_dtype(tokenizer.vocab_size))
    return str(path)


EVERY_OBJECTIVE: dict[str, Any] = {"prefix_lm": 0.45, "span_corruption": 0.1, "masked_prefix": 0.45}


@pytest.fixture
def make_config(prefix: str, model_path: Path) -> Callable[..., RunConfig]:
    """Return a function that makes a configuration; keywords replace settings of the data section."""

    def make(
        *, encoder: int = 256, decoder: int = 256, width: int = 16, objective: dict[str, Any] | None = None, **data: Any
    ) -> RunConfig:
        settings: dict[str, Any] = {
            "tokenizer": str(model_path),
            "corpora": (Corpus(prefix=prefix),),
            "encoder_seq_length": encoder,
            "decoder_seq_length": decoder,
            "split": (80.0, 10.0, 10.0),
        }
        model = ModelConfig(encoder_layers=2 if encoder else 0, decoder_layers=2, axial_width=width, vocab_size=600)
        return RunConfig(
            model=model,
            data=DataConfig(**{**settings, **data}),
            objective=ObjectiveConfig(**(EVERY_OBJECTIVE | (objective or {}))),
            training=TrainingConfig(train_steps=20),
        )

    return make


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path
