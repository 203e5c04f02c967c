"""A model that leaves, is trained on with Transformers and comes back says what it said there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import difference, our_logits, padded, texts, write_case
from written_models import TEXT, tiny_tokenizer

from megatron_omega.export.hugging_face.importing import import_folder
from megatron_omega.export.hugging_face.registration import register
from megatron_omega.export.loading import load_omega
from megatron_omega.model.omega import Omega

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
ENCODER, DECODER = texts((23, 40), 1), texts((31, 12), 2)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return write_case("omega", tmp_path_factory.mktemp("case"))[0]


def our_loss(model: Omega) -> torch.Tensor:
    """Return the mean loss of both texts, each decoder starting as `labels` alone make it start."""
    losses = []
    for encoder, labels in zip(ENCODER, DECODER, strict=True):
        begin = torch.tensor([tiny_tokenizer().special.bos])
        logits = our_logits(model, encoder, torch.cat((begin, labels[:-1])))[0]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return torch.stack(losses).sum() / sum(map(len, DECODER))


@torch.no_grad()
def their_loss(model: Any) -> torch.Tensor:
    labels = padded(DECODER, "right")
    labels = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    return model.eval()(**padded(ENCODER, "right"), labels=labels).loss


def test_a_process_without_this_package_loads_saves_and_loads_again(export: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("stranger.py")
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-B", str(script), str(export), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["type"] == "gpt_omega" and torch.equal(found["lm True"], found["lm False"])
    model, _ = load_omega(export)
    ids = tiny_tokenizer().encode("The quick")
    prefix, mask = tiny_tokenizer().special.modes.prefix, tiny_tokenizer().special.modes.mask
    assert found["ids"][0] == [prefix, *ids]
    expected = our_logits(model, torch.tensor([prefix, *ids]), torch.tensor([*ids[-16:], prefix, *ids[:-1]]))[0]
    expected = expected[min(16, len(ids)) - 1 :]
    assert difference(found["lm True"][0, : len(expected)], expected) < 1e-5
    expected = our_logits(model, torch.tensor([mask, *ids]), torch.tensor([ids[-1]]))[1]
    assert difference(found["mlm"][0, : len(expected)], expected) < 1e-5


class Pairs(torch.utils.data.Dataset):
    """Texts to be continued, tokenised as a user does."""

    def __init__(self, tokenizer: Any) -> None:
        pairs = [(text[:cut], text[cut:]) for text in TEXT[:2] for cut in range(5, 40, 5)]
        self.rows = [dict(tokenizer(prompt, text_target=answer)) for prompt, answer in pairs]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def train(model: Any, tokenizer: Any, folder: Path, steps: int, rate: float) -> list[float]:
    settings = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=rate, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, predict_with_generate=True,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
    data = Pairs(tokenizer)
    trainer = transformers.Seq2SeqTrainer(
        model=model, args=settings, train_dataset=data, eval_dataset=data, data_collator=collator,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    predicted = trainer.predict(data, max_new_tokens=5).predictions
    assert len(predicted) == len(data)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_seq2seq_trainer_learns_and_the_model_comes_back(export: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(export)
    losses = train(model, tokenizer, tmp_path / "trainer", 50, 3e-3)
    assert len(losses) == 50 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    model.save_pretrained(tmp_path / "tuned")
    import_folder(tmp_path / "tuned", tmp_path / "imported", tokenizer=export / "tokenizer.model")
    ours, _ = load_omega(tmp_path / "imported")
    torch.testing.assert_close(our_loss(ours), their_loss(model), rtol=1e-5, atol=0)


def test_lora_on_all_linear_layers_merged_and_imported(export: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(export)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    matrices = {name for name, module in base.named_modules() if type(module).__name__ == "Linear" and "lora" in name}
    assert {name.rpartition(".")[2] for name in adapted} == {"qkv", "out", "q", "kv", "gate_up", "down", "dynamic"}
    assert len(adapted) * 2 == len(matrices)
    train(model, transformers.AutoTokenizer.from_pretrained(export), tmp_path / "trainer", 10, 3e-2)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    import_folder(tmp_path / "merged", tmp_path / "imported", tokenizer=export / "tokenizer.model")
    ours, _ = load_omega(tmp_path / "imported")
    before, _ = load_omega(export)
    torch.testing.assert_close(our_loss(ours), their_loss(merged), rtol=1e-5, atol=0)
    assert abs(our_loss(ours) - our_loss(before)) > 1e-3


def test_what_registered_classes_save_carries_the_code(export: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(export)
    model.save_pretrained(tmp_path / "saved")
    transformers.AutoTokenizer.from_pretrained(export).save_pretrained(tmp_path / "saved")
    for file in export.glob("*_gpt_omega.py"):
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert settings["auto_map"]["AutoConfig"] == "configuration_gpt_omega.GPTOmegaConfig"
