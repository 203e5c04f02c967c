"""Small random models, a tokenizer for them, and their checkpoints as several ranks would write them, without engines."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from megatron_omega.checkpoint.manifest import KINDS, EngineState, Kind, SavedLayout
from megatron_omega.checkpoint.writer import Piece, Snapshot, write_checkpoint
from megatron_omega.config.schema import RunConfig
from megatron_omega.data.tokenizer import Tokenizer, train_tokenizer
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.parameters import declared_parameters
from megatron_omega.parallel.regions import Region
from megatron_omega.parallel.tensor_parallel import TensorParallel

WINDOW, WIDTH = 16, 8
VOCAB_SIZE = 420
TEXT = ("The quick brown fox jumps over the lazy dog. ", "Zwölf Boxkämpfer jagen Viktor quer über den Deich. ") * 20


def tiny_config(**sections: dict[str, Any]) -> RunConfig:
    """An encoder-decoder with every branch and every objective; `sections` override fields."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2,
            "vocab_size": VOCAB_SIZE, "local_window": WINDOW, "axial_width": WIDTH,
        },
        "data": {"encoder_seq_length": 96, "decoder_seq_length": 96},
        "objective": {"prefix_lm": 0.45, "span_corruption": 0.1, "masked_prefix": 0.45},
        "precision": {"dtype": "fp32"},
    }  # fmt: skip
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return RunConfig.model_validate(values)


def tiny_model(config: RunConfig, seed: int = 0) -> Omega:
    """A model whose every parameter is random: nothing is hidden by zeros and ones."""
    model = Omega(ModelContext.of(config)).eval().requires_grad_(requires_grad=False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXT, vocab_size=VOCAB_SIZE, num_threads=1))


class ThreadPeers(Peers):
    """Ranks that are threads."""

    def __init__(self, rank: int, board: list[JsonValue], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self._board, self._barrier = board, barrier

    def exchange(self, value: JsonValue) -> list[JsonValue]:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()
        return values


def write_model(
    model: Omega,
    config: RunConfig,
    directory: Path,
    *,
    step: int = 1,
    tensor: int = 1,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write the checkpoint of `step` as `tensor` tensor-parallel ranks would; return its folder."""
    fingerprint = (tokenizer or tiny_tokenizer()).fingerprint
    board: list[JsonValue] = [None] * tensor
    barrier = threading.Barrier(tensor, timeout=20)
    snapshots = [
        Snapshot(_pieces(model, rank, tensor), _head(config, step, tensor, fingerprint)) for rank in range(tensor)
    ]
    with ThreadPoolExecutor(tensor) as pool:
        folders = pool.map(
            lambda rank: write_checkpoint(directory, snapshots[rank], ThreadPeers(rank, board, barrier), token="t"),
            range(tensor),
        )
        return next(iter(folders))


def _pieces(model: Omega, rank: int, tensor: int) -> Sequence[Piece]:
    parallel = TensorParallel(None, rank, tensor)
    pieces = []
    for info, parameter in declared_parameters(model):
        if info.axis is None and rank:
            continue
        start, stop = (0, 0) if info.axis is None else parallel.shard(info.shape[info.axis])
        data = parameter if info.axis is None else parameter.narrow(info.axis, start, stop - start)
        region = Region(info.shape, info.axis, start, stop, 0, data.numel())
        tensors: dict[Kind, torch.Tensor] = {kind: data.reshape(-1).clone() for kind in KINDS}
        pieces.append(Piece(info.name, info.axis, region, 1.0, tensors))
    return pieces


def _head(config: RunConfig, step: int, tensor: int, tokenizer: str) -> dict[str, Any]:
    return {
        "step": step, "versions": {}, "config": config.model_dump(mode="json"), "state": {}, "validation_loss": None,
        "identity": {"model": config.model.model_dump(mode="json"), "tokenizer": tokenizer},
        "layout": SavedLayout(pipeline=1, data=1, tensor=tensor, zero_stage=1, dtype="float32"),
        "engine": EngineState(global_steps=step, global_samples=step, skipped_steps=0, loss_scaler={}),
    }  # fmt: skip


def write_run(folder: Path, model: Omega | None = None, **sections: dict[str, Any]) -> RunConfig:
    """Write a run folder with a tokenizer and one checkpoint; return its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().processor.serialized_model_proto())
    data = {"tokenizer": str(folder / "tokenizer.model")} | sections.pop("data", {})
    config = tiny_config(**sections, data={"encoder_seq_length": 96, "decoder_seq_length": 96} | data)
    write_model(model or tiny_model(config), config, folder / "checkpoints")
    return config
