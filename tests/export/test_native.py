"""An export is the checkpoint's weights, whole or not there, and says so itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from written_models import tiny_config, tiny_model, tiny_tokenizer, write_model

from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.errors import CheckpointError
from megatron_omega.export import native as export
from megatron_omega.export.native import is_export, open_export, write_export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config()
    return write_model(tiny_model(config), config, tmp_path_factory.mktemp("run"), tensor=2)


def make(target: Path, checkpoint: Path, dtype: str = "fp32", shard_bytes: int = 2**40) -> Path:
    with open_checkpoint(checkpoint) as source:
        write_export(target, source, tiny_tokenizer(), dtype=dtype, shard_bytes=shard_bytes)  # pyright: ignore[reportArgumentType]
    return target


@pytest.mark.parametrize(("dtype", "shard_bytes"), [("fp32", 2**40), ("bf16", 2**40), ("fp32", 20_000), ("fp32", 1)])
def test_every_tensor_is_the_checkpoints(dtype: str, shard_bytes: int, checkpoint: Path, tmp_path: Path) -> None:
    found = open_export(make(tmp_path / "export", checkpoint, dtype, shard_bytes))
    with open_checkpoint(checkpoint) as source:
        assert set(found.names()) == set(source.names())
        assert found.config == source.config and found.identity == source.identity
        for name in source.names():
            assert torch.equal(found.tensor(name), source.tensor(name).to(export.DTYPES[dtype]))
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == tiny_tokenizer().model
    found.close()


def test_other_libraries_find_their_way(checkpoint: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "export", checkpoint, shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {
        name: tensor for file in set(index["weight_map"].values()) for name, tensor in load_file(folder / file).items()
    }
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(file.stat().st_mode & 0o444 == (folder.stat().st_mode & 0o444) for file in folder.iterdir())
    assert "AutoModel" in (folder / "README.md").read_text()


def test_nothing_is_overwritten_and_nothing_is_half_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "export", checkpoint)
    with pytest.raises(CheckpointError, match="exists"):
        make(folder, checkpoint)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        make(tmp_path / "other", checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_damage_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "export", checkpoint)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.decoder.norm.weight"] = tensors["model.decoder.norm.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = open_export(folder)
    found.tensor("token_table.weight")
    with pytest.raises(CheckpointError, match=r"changed bytes; tensor decoder\.norm\.weight"):
        found.tensor("decoder.norm.weight")
    found.close()
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_export(folder).tensor("decoder.norm.weight")


def test_a_description_or_header_with_another_byte_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "export", checkpoint)
    weights, config = folder / "model.safetensors", folder / "omega.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole.replace(b'"format":"pt"', b'"format":"tp"', 1))
    with pytest.raises(CheckpointError, match="in its header"):
        open_export(folder).tensor("token_table.weight")
    weights.write_bytes(whole)
    config.write_text(config.read_text().replace('"step": ', '"step": 1', 1))
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        open_export(folder)


def test_a_description_that_leads_outside_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "export", checkpoint)
    description = folder / "omega.json"
    unsigned = description.read_text().replace('"version": 2', '"version": 1')
    description.write_text(unsigned)
    with pytest.raises(CheckpointError, match="not where version 1"):
        open_export(folder)
    description.unlink()
    config = folder / "config.json"
    config.write_text(unsigned.replace('"model.safetensors"', '"../model.safetensors"', 1))
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_export(folder)
    config.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_export(folder)
    assert not is_export(folder) and not is_export(tmp_path)
