"""Fine-tuning, whole or with adapters, gives the same figures under every layout, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from resuming import unbroken_and_broken
from tiny import TinyCorpus

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.arguments import Override
from megatron_omega.studies.layouts import compare, measure, parse_layout

pytestmark = pytest.mark.distributed
STEPS, TOLERANCE = 4, 1e-5
SMALL = ("model.ffn_hidden_size=192", "model.hidden_size=48", "model.num_attention_heads=6", "model.head_dim=8")
LORA = ("lora.rank=4", "optimizer.learning_rate=0.01")
MODES = {"whole": (), "lora": LORA, "more": (*LORA, "lora.also=[table, vectors]")}


def overrides(*words: str) -> list[Override]:
    return [Override(*word.split("=", 1)) for word in (*SMALL, "data.decoder_seq_length=48", *words)]


@pytest.fixture(scope="module")
def base(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the settings that start from a pretrained checkpoint, on pairs."""
    folder = tmp_path_factory.mktemp("base")
    measure(tiny_corpus.run_yaml, parse_layout("tp1"), overrides(), steps=2, folder=folder)
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": "where is " + "it " * (k % 9) + str(k), "target": " there" * (k % 5 + 1)} for k in range(64)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = folder / "tp1/checkpoints/step-00000002"
    task = json.dumps([{"path": str(pairs)}])
    return (
        f"data.tasks={task}",
        f"checkpoint.load={load}",
        "checkpoint.load_weights_only=true",
        "data.split=[1, 0, 0]",
    )


@pytest.fixture(scope="module")
def references(base: tuple[str, ...], tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("reference")
    return {
        mode: measure(
            tiny_corpus.run_yaml, parse_layout("tp1"), overrides(*base, *more), steps=STEPS, folder=folder / mode
        )
        for mode, more in MODES.items()
    }


@pytest.mark.parametrize(
    ("mode", "label"),
    [
        ("whole", "tp2-pp2"),
        ("whole", "dp2"),
        ("whole", "dp2-zero3"),
        ("lora", "tp3"),
        ("lora", "tp2sp-pp2"),
        ("lora", "dp2-zero3"),
        ("more", "tp3"),
        ("more", "tp2sp-pp2"),
        ("more", "dp2-zero3"),
    ],
)
def test_layout_equals_one_process(
    mode: str, label: str, base: tuple[str, ...], references: dict, tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    rows = measure(
        tiny_corpus.run_yaml, parse_layout(label), overrides(*base, *MODES[mode]), steps=STEPS, folder=tmp_path
    )
    comparison = compare(label, references[mode], rows, TOLERANCE)
    assert comparison.passed, comparison.differences
    assert references[mode][-1]["lm_loss"] < references[mode][0]["lm_loss"]
    if mode != "whole":  # what is new changes nothing
        assert references[mode][0]["lm_loss"] == pytest.approx(references["whole"][0]["lm_loss"], rel=1e-6)


@pytest.mark.parametrize("mode", ["lora", "more"])
def test_adapters_resume_bit_for_bit_and_are_all_that_is_saved(
    mode: str, base: tuple[str, ...], tiny_corpus: TinyCorpus, tmp_path: Path
) -> None:
    more = overrides(*base, *MODES[mode], "checkpoint.interval_steps=2")
    unbroken, broken = unbroken_and_broken(tiny_corpus.run_yaml, "tp2", more, STEPS, tmp_path)
    readers = [open_checkpoint(run / f"checkpoints/step-{STEPS:08d}") for run in (unbroken, broken)]
    names = readers[0].names()
    beside = [name for name in names if ".lora_" not in name]
    assert names == readers[1].names() and bool(beside) == (mode == "more")
    assert all(
        name.endswith(("norm.weight", "qk_gains", "dynamic.weight", "dynamic.bias", "token_table.weight"))
        for name in beside
    )
    assert all(torch.equal(readers[0].tensor(name), readers[1].tensor(name)) for name in names)
    files = sum(file.stat().st_size for file in readers[0].path.glob("*.safetensors"))
    assert files == pytest.approx(12 * readers[0].element_count(), rel=0.5)  # weight and two moments, and headers
    config = yaml.safe_load((unbroken / "config.yaml").read_text())
    assert config["lora"]["rank"] == 4
