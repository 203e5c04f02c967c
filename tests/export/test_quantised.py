"""Libraries that keep an export's matrices in fewer bits, or part of it elsewhere, find what they look for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import difference, padded, texts, write_case
from torch import nn

from megatron_omega.export.hugging_face.registration import register

transformers = pytest.importorskip("transformers")
ENCODER, DECODER = texts((23, 40), 1), texts((31, 12), 2)
NAMES = ("omega", "decoder-only")
"""Of `CASES`: both stacks, and one."""


@pytest.fixture(scope="module", params=NAMES)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    return write_case(request.param, tmp_path_factory.mktemp("case"))[0]


def load(export: Path, **settings: Any) -> Any:
    is_decoder_only = "ForCausalLM" in (export / "config.json").read_text().partition("architectures")[2][:60]
    kind = transformers.AutoModelForCausalLM if is_decoder_only else transformers.AutoModelForSeq2SeqLM
    return kind.from_pretrained(export, **settings).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    decoder = padded(DECODER, "right")
    if model.config.is_encoder_decoder:
        named = {f"decoder_{name}": value for name, value in decoder.items()}
        return model(**padded(ENCODER, "right"), **named).logits[1, :12]
    return model(**decoder).logits[1, :12]


def test_int8_of_torchao_reaches_every_matrix_and_writes(export: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    exact, scheme = load(export), torchao.Int8WeightOnlyConfig()
    model = load(export, quantization_config=transformers.TorchAoConfig(scheme))
    matrices = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name
    ]
    assert matrices and all(hasattr(matrix.weight, "qdata") for matrix in matrices)
    assert 1e-4 < difference(logits(model), logits(exact)) < 0.3
    written = model.generate(**padded(ENCODER, "left"), max_new_tokens=5, min_new_tokens=5)
    assert written.shape == (2, 6 if model.config.is_encoder_decoder else 45)


def test_int8_of_bitsandbytes_on_a_cpu(export: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; it is no dependency of ours")
    scheme = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = load(export, quantization_config=scheme, device_map="cpu")
    assert 1e-4 < difference(logits(model), logits(load(export))) < 0.5


def test_what_lies_elsewhere_is_fetched_layer_by_layer(export: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    exact = logits(load(export))
    assert torch.equal(logits(load(export, device_map="auto")), exact)
    model = load(export, device_map={"": "disk"}, offload_folder=tmp_path)
    assert {value.device.type for value in model.parameters()} == {"meta"}
    assert torch.equal(logits(model), exact)
