"""Adapters travel to PEFT and back: equal logits there, equal numbers here, and a stranger's folder is not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import difference, our_logits, padded, texts, write_case
from safetensors.torch import load_file, save_file

from megatron_omega.commands.export import main as export_main
from megatron_omega.commands.import_hf import main as import_main
from megatron_omega.errors import CheckpointError, ConfigError
from megatron_omega.export.adapted import AdaptedReader, open_whole
from megatron_omega.export.hugging_face.adapter_folder import (
    SETTINGS_NAME,
    WEIGHTS_NAME,
    import_adapters,
    write_adapters,
)
from megatron_omega.export.hugging_face.registration import register
from megatron_omega.export.loading import load_omega

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
ENCODER, DECODER = texts((23,), 1)[0], texts((31,), 2)[0]
EVERYWHERE = ["attention.qkv", "attention.out", "gate_up", "down", "cross.q", "cross.kv", "cross.out"]
CASES = {
    "omega": {"r": 4, "target_modules": EVERYWHERE},
    "decoder-only": {"r": 3, "target_modules": ["qkv", "down"], "lora_alpha": 5},
    "pattern, sinks": {"r": 2, "target_modules": ["out", "kv"], "use_rslora": True},
}


def their_class(name: str) -> Any:
    return transformers.AutoModelForCausalLM if name == "decoder-only" else transformers.AutoModelForSeq2SeqLM


def trained_there(export: Path, name: str, folder: Path) -> Any:
    """Return a PEFT model whose adapters are random, saved in `folder`."""
    register()
    settings = CASES[name] | {"task_type": "CAUSAL_LM" if name == "decoder-only" else "SEQ_2_SEQ_LM"}
    model = peft.get_peft_model(their_class(name).from_pretrained(export), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if ".lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def their_logits(model: Any, name: str) -> torch.Tensor:
    if name == "decoder-only":
        return model(**padded([DECODER], "right")).logits[0]
    decoder = padded([DECODER], "right")["input_ids"]
    return model(**padded([ENCODER], "right"), decoder_input_ids=decoder).logits[0]


@pytest.mark.parametrize("name", list(CASES))
def test_adapters_trained_there_say_the_same_here_and_go_back_as_they_came(name: str, tmp_path: Path) -> None:
    export, _ = write_case(name, tmp_path / "run")
    base, folder = tmp_path / "run/checkpoints", tmp_path / "theirs"
    model = trained_there(export, name, folder)
    found = import_adapters(folder, tmp_path / "imported", base)
    assert found.num_new == (2 if name == "pattern, sinks" else 0)  # q of both decoder layers
    ours, _ = load_omega(found.checkpoint)
    assert difference(our_logits(ours, ENCODER, DECODER)[0], their_logits(model, name)) < 1e-5
    plain, _ = load_omega(base)
    assert difference(our_logits(plain, ENCODER, DECODER)[0], their_logits(model, name)) > 1e-3
    with open_whole(found.checkpoint) as source:
        assert isinstance(source, AdaptedReader)
        write_adapters(tmp_path / "again", source, base_name=str(export))
    again = peft.PeftModel.from_pretrained(their_class(name).from_pretrained(export), tmp_path / "again").eval()
    assert difference(their_logits(again, name), their_logits(model, name)) < 1e-5
    sent, came = (load_file(place / WEIGHTS_NAME) for place in (folder, tmp_path / "again"))
    assert sent.keys() <= came.keys() and all(torch.equal(came[key], tensor) for key, tensor in sent.items())
    assert len(came) == len(sent) + 2 * found.num_new
    returned = import_adapters(tmp_path / "again", tmp_path / "returned", base)
    assert returned.num_new == 0 and returned.num_parameters == found.num_parameters


def test_the_verbs_take_and_give_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, _ = write_case("omega", tmp_path / "run")
    trained_there(export, "omega", tmp_path / "theirs")
    words = ["--folder", str(tmp_path / "theirs"), "--output", str(tmp_path / "imported")]
    with pytest.raises(ConfigError, match="--base"):
        import_main(words)
    import_main([*words, "--base", str(tmp_path / "run/checkpoints"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["lora"]["rank"] == 4 and len(told["lora"]["targets"]) == 5
    export_main(["--checkpoint", str(tmp_path / "imported"), "--output", str(tmp_path / "out"), "--adapters"])
    assert f"{told['num_parameters']:,} parameters" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="whole model"):
        export_main(["--checkpoint", str(tmp_path / "run/checkpoints"), "--output", str(tmp_path / "no"), "--adapters"])


def change_settings(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / SETTINGS_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / WEIGHTS_NAME
        save_file({key: tensor.contiguous() for key, tensor in change(load_file(file)).items()}, file)

    return apply


def without_halves(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if ".lora_A" in key}


def under_another_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("attention.qkv", "attention.dynamic"): tensor for key, tensor in tensors.items()}


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (change_settings(use_dora=True), "use_dora"),
    "biases": (change_settings(bias="all"), "bias"),
    "whole modules": (change_settings(modules_to_save=["lm_head"]), "modules_to_save"),
    "other ranks": (change_settings(rank_pattern={"cross.q": 2}), "rank_pattern"),
    "no LoRA": (change_settings(peft_type="IA3"), "LORA"),
    "no rank": (change_settings(r=0), "r: "),
    "another rank": (change_settings(r=5), "its rank need"),
    "no JSON": (lambda folder: (folder / SETTINGS_NAME).write_text("{"), "not JSON"),
    "halves": (change_tensors(without_halves), "one half"),
    "not finite": (change_tensors(lambda t: {k: v / 0 for k, v in t.items()}), "not finite"),
    "integers": (change_tensors(lambda t: {k: v.int() for k, v in t.items()}), "not finite"),
    "other products": (change_tensors(under_another_name), "no adapter of this model"),
    "nothing": (change_tensors(lambda _: {}), "is empty"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "is not there"),
    "cut off": (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"\x00" * 20), "cannot be read"),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("case")
    export, _ = write_case("omega", folder / "run")
    trained_there(export, "omega", folder / "theirs")
    return folder


@pytest.mark.parametrize("name", list(STRANGE))
def test_a_strange_folder_ends_in_one_sentence(name: str, case: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for file in (case / "theirs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change, words = STRANGE[name]
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        import_adapters(folder, tmp_path / "imported", case / "run/checkpoints")
    assert not (tmp_path / "imported/step-00000000").exists()


def test_adapters_meet_no_other_base(case: Path, tmp_path: Path) -> None:
    import_adapters(case / "theirs", tmp_path / "imported", case / "run/checkpoints")
    with open_whole(tmp_path / "imported/step-00000000") as source:
        assert isinstance(source, AdaptedReader)
        write_adapters(tmp_path / "out", source)
    with pytest.raises(CheckpointError, match="adapters itself"):
        import_adapters(tmp_path / "out", tmp_path / "no", tmp_path / "imported")
    write_case("omega", tmp_path / "other")
    other = tmp_path / "other/checkpoints"
    weights = next(other.glob("step-*/weights-*.safetensors"))
    assert weights.exists()
    import_adapters(tmp_path / "out", tmp_path / "same", other)  # the same weights elsewhere are the same base
    write_case("encoder local", tmp_path / "third")
    with pytest.raises(CheckpointError, match="other weights"):
        import_adapters(tmp_path / "out", tmp_path / "no", tmp_path / "third/checkpoints")
