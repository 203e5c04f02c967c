"""Small exports for the tests of Transformers, and what our own model says of the same texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from written_models import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer, write_model

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.export.native import write_export
from megatron_omega.model.omega import Omega, vocabulary_logits

CASES: dict[str, dict[str, Any]] = {
    "omega": {},
    "t5-like": {"encoder_branches": ["full"], "decoder_branches": ["causal"], "mlm_head": False},
    "llama-like": {"encoder_layers": 0, "decoder_branches": ["causal"]},
    "decoder-only": {"encoder_layers": 0, "decoder_branches": ["causal", "local", "axial"]},
    "hd32-like": {
        "num_attention_heads": 3, "head_dim": 16, "encoder_branches": ["dynamic", "local", "axial"],
        "decoder_branches": ["causal"], "decoder_start": "begin", "shared_mode_token": True,
    },
    "parametrization 1": {"parametrization": 1, "output_multiplier": 0.7, "depth_base": 2},
    "encoder local": {"encoder_branches": ["local"]},
    "encoder axial": {"encoder_branches": ["axial"]},
    "encoder dynamic": {"encoder_branches": ["dynamic"]},
    "decoder local": {"decoder_branches": ["local"]},
    "decoder axial": {"decoder_branches": ["axial"]},
    "decoder select": {"decoder_branches": ["select"], "select_blocks": 2},
    "pattern, sinks": {
        "encoder_branches": [["full", "dynamic"], ["local", "axial"]],
        "decoder_branches": [["select", "causal"], ["causal", "local", "axial"]], "attention_sinks": True,
    },
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned"},
}  # fmt: skip


def write_case(name: str, folder: Path, dtype: str = "fp32") -> tuple[Path, Omega]:
    """Write a run with a tokenizer, and its export; return the folder of the export and the model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().model)
    data = {"tokenizer": str(folder / "tokenizer.model")}
    config = tiny_config(model=CASES[name], data={"encoder_seq_length": 128, "decoder_seq_length": 128} | data)
    model = tiny_model(config)
    checkpoint = write_model(model, config, folder / "checkpoints", tensor=1)
    with open_checkpoint(checkpoint) as source:
        write_export(folder / "export", source, tiny_tokenizer(), dtype=dtype, shard_bytes=20_000)  # pyright: ignore[reportArgumentType]
    return folder / "export", model


def trained_elsewhere(export: Path, folder: Path, leave_out: str = "mlm.", names: int = 4) -> Path:
    """Write what save_pretrained writes after training: other weights, no omega.json, no tokenizer.model."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(export.glob("*.safetensors")):
        tensors |= {name: tensor * 1.5 for name, tensor in load_file(file).items() if not name.startswith(leave_out)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((export / "config.json").read_text()) | {"transformers_version": "5.23.0"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def texts(lengths: Sequence[int], seed: int) -> list[Tensor]:
    """Return random ids of text, [n] each."""
    generator = torch.Generator().manual_seed(seed)
    low = min(tiny_tokenizer().text_ids)
    return [torch.randint(low, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def padded(rows: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """Return a batch of `rows` with its mask."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long).unbind()
    for row, tokens in enumerate(rows):
        at = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, at], mask[row, at] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def our_logits(model: Omega, encoder: Tensor, decoder: Tensor) -> list[Tensor]:
    """Return the logits of the decoder and, where there is one, of the MLM head: [s, vocab_size] each."""
    streams = [decoder] if model.context.model.is_decoder_only else [encoder, decoder]
    inputs = tuple(part for ids in streams for part in (ids.unsqueeze(0), torch.ones_like(ids).unsqueeze(0)))
    hidden, *mlm = model.hidden(inputs)
    logits = [vocabulary_logits(model, hidden)[0]]
    return [*logits, vocabulary_logits(model, mlm[0], mlm[1])[0]] if mlm else logits


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in standard deviations of what is expected."""
    return float((found - expected).abs().max() / expected.std())
