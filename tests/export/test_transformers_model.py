"""What Transformers computes from an export is what our own model computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import CASES, difference, our_logits, padded, texts, write_case
from torch import Tensor
from written_models import tiny_tokenizer

import megatron_omega
from megatron_omega.commands import generate
from megatron_omega.config.schema import ModelConfig
from megatron_omega.export.hugging_face.exporting import model_code
from megatron_omega.export.hugging_face.registration import register
from megatron_omega.model.omega import Omega

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5
ENCODER, DECODER = texts((40, 23, 9), 1), texts((75, 31, 50), 2)
Case = Callable[[str], tuple[Path, Omega]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    register()
    return cache(lambda name: write_case(name, tmp_path_factory.mktemp("case")))


def load(folder: Path, **options: Any) -> Any:
    """Load the language model of an export, every weight of it and no other."""
    settings = json.loads((folder / "config.json").read_text())
    auto = transformers.AutoModelForSeq2SeqLM if settings["encoder_layers"] else transformers.AutoModelForCausalLM
    return load_with(auto, folder, **options)


def load_with(auto: Any, folder: Path, **options: Any) -> Any:
    model, found = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model.eval()


def batch(model: Any, side: str) -> dict[str, Tensor]:
    decoder = padded(DECODER, side)
    if not model.config.is_encoder_decoder:
        return decoder
    return padded(ENCODER, side) | {f"decoder_{name}": tensor for name, tensor in decoder.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_are_ours_with_padding_on_either_side(case: Case, name: str) -> None:
    folder, ours = case(name)
    model = load(folder)
    expected = [our_logits(ours, encoder, decoder) for encoder, decoder in zip(ENCODER, DECODER, strict=True)]
    assert torch.cat([row[0] for row in expected]).std() > 0.01
    for side in ("left", "right"):
        given = batch(model, side)
        found = model(**given).logits
        mask = given.get("decoder_attention_mask", given["attention_mask"]).bool()
        for row, (wanted, *_) in enumerate(expected):
            assert difference(found[row][mask[row]], wanted) < TOLERANCE
        if not ours.context.model.has_mlm_head:
            continue
        masked = load_with(transformers.AutoModelForMaskedLM, folder)
        rows = padded(ENCODER, side)
        found = masked(**rows).logits
        for row, (_, wanted) in enumerate(expected):
            assert difference(found[row][rows["attention_mask"][row].bool()], wanted) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["omega", "decoder-only", "pattern, sinks", "learned"])
@pytest.mark.parametrize("is_static", [False, True], ids=["dynamic cache", "static cache"])
def test_a_cache_changes_nothing(case: Case, name: str, is_static: bool) -> None:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

    model = load(case(name)[0])
    given = batch(model, "left")
    whole = model(**given, use_cache=False).logits
    prefix = "decoder_" if model.config.is_encoder_decoder else ""
    ids, mask = given.pop(f"{prefix}input_ids"), given.pop(f"{prefix}attention_mask")
    own: Any = StaticCache(config=model.config, max_cache_len=90) if is_static else DynamicCache()
    past = EncoderDecoderCache(own, DynamicCache()) if prefix else own
    if prefix:
        given["encoder_outputs"] = model.get_encoder()(**given)
    found = []
    for first, end in ((0, 30), (30, 31), (31, 40), *((at, at + 1) for at in range(40, ids.shape[1]))):
        part = {f"{prefix}input_ids": ids[:, first:end], f"{prefix}attention_mask": mask[:, :end]}
        found.append(model(**given | part, past_key_values=past, use_cache=True).logits)
    real = mask.bool()
    assert difference(torch.cat(found, 1)[real], whole[real]) < TOLERANCE


@torch.no_grad()
def test_attention_spelled_out_and_in_bf16(case: Case) -> None:
    folder, _ = case("omega")
    model = load(folder)
    given = batch(model, "right")
    mask = given["decoder_attention_mask"].bool()
    expected = model(**given).logits[mask]
    assert difference(load(folder, attn_implementation="eager")(**given).logits[mask], expected) < TOLERANCE
    assert difference(load(folder, dtype=torch.bfloat16)(**given).logits[mask], expected) < 0.3


PROMPTS = ["The quick", "", "Zwölf Boxkämpfer jagen", "The lazy dog. The", "x"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["omega", "t5-like", "hd32-like", "decoder-only", "pattern, sinks"])
def test_greedy_text_is_ours_token_for_token(case: Case, name: str) -> None:
    folder, ours = case(name)
    model, expected = load(folder), megatron_omega.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for side in ("left", "right")[: 1 if ours.context.model.is_decoder_only else 2]:
        given = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
        found = model.generate(**given, max_new_tokens=60)
        start = given["input_ids"].shape[1] if ours.context.model.is_decoder_only else 1
        for prompt, ids in zip(PROMPTS, found.tolist(), strict=True):
            wanted = expected.generate(prompt, max_new_tokens=60, temperature=0)
            assert tiny_tokenizer().decode(ids[start:]) == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", ["omega", "decoder-only", "pattern, sinks"])
def test_beams_are_ours_and_do_not_depend_on_the_cache(
    case: Case, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ours = case(name)
    model = load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPTS[:3], return_tensors="pt", padding=True)
    options: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 20}
    found = [model.generate(**given, **options, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*found)
    capsys.readouterr()
    words = ["--checkpoint", str(folder), "--prompt", *PROMPTS[:3], "--beams", "4", "--num-samples", "2", "--json"]
    generate.main([*words, "--max-new-tokens", "20"])
    wanted = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    start = given["input_ids"].shape[1] if ours.context.model.is_decoder_only else 1
    assert [tiny_tokenizer().decode(ids[start:]) for ids in found[0].tolist()] == wanted


@torch.no_grad()
def test_masks_are_filled_as_by_ours(case: Case) -> None:
    folder, _ = case("omega")
    text = "The quick <mask> fox"
    (wanted,) = megatron_omega.load(folder).fill_mask(text, top_k=3).masks
    fill = transformers.pipeline(
        "fill-mask", model=load_with(transformers.AutoModelForMaskedLM, folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    found = [answer for answer in fill(text, top_k=200) if answer["token"] in tiny_tokenizer().text_ids]
    assert [answer["token"] for answer in found[:3]] == [candidate.token_id for candidate in wanted]


def test_the_configuration_has_every_setting_of_the_model_and_its_defaults() -> None:
    from megatron_omega.export.hugging_face.model.configuration_gpt_omega import GPTOmegaConfig

    settings = json.loads(GPTOmegaConfig().to_json_string(use_diff=False))
    assert {name: settings[name] for name in ModelConfig.model_fields} == ModelConfig().model_dump(mode="json")
    assert GPTOmegaConfig.from_dict(settings).decoder_overlap == ModelConfig().decoder_overlap
    del settings["decoder_overlap"]
    assert GPTOmegaConfig.from_dict(settings).decoder_overlap == 1, "an export of before the setting existed"


def test_what_is_initialised_there_starts_at_the_same_loss(case: Case) -> None:
    folder, ours = case("omega")
    model = load(folder)
    fresh = type(model)(model.config)
    with torch.no_grad():
        loss = fresh(**padded(ENCODER, "right"), labels=padded(DECODER, "right")["input_ids"]).loss
    assert abs(loss - torch.log(torch.tensor(float(ours.context.model.vocab_size)))) < 1.5


def test_every_file_of_the_models_code_travels(case: Case) -> None:
    folder, _ = case("omega")
    assert len(model_code()) == 6
    assert all((folder / name).read_bytes() == content for name, content in model_code().items())


def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    model = load(case("omega")[0]).train()
    given = padded(ENCODER, "right") | {"labels": padded(DECODER, "right")["input_ids"]}
    gradients = []
    for uses_checkpoints in (False, True):
        if uses_checkpoints:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert difference(gradients[1], gradients[0]) < TOLERANCE
