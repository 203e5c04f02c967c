"""What was exported, or trained on with Transformers, comes back as a checkpoint; a stranger's folder is not trusted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import our_logits, texts, trained_elsewhere, write_case
from safetensors.torch import load_file, save_file
from written_models import tiny_tokenizer

from megatron_omega.checkpoint.catalogue import newest_whole, require_same_model
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.store import CheckpointStore
from megatron_omega.config.schema import CheckpointConfig, RunConfig
from megatron_omega.engine.internals import engine_holdings
from megatron_omega.errors import CheckpointError, DataError
from megatron_omega.export.hugging_face.importing import import_folder
from megatron_omega.export.loading import load_omega, open_weights
from megatron_omega.export.native import INDEX_NAME, open_export, write_export
from megatron_omega.export.starting import starting_weights
from megatron_omega.launching.local_ranks import run_ranks
from megatron_omega.parallel.parameters import declared_parameters
from megatron_omega.studies.made_up import small_config, start_engine

ENCODER, DECODER = texts((23,), 1)[0], texts((31,), 2)[0]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case("pattern, sinks", tmp_path_factory.mktemp("case"))[0]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["omega", "decoder-only", "learned", "pattern, sinks"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exported_imported_and_exported_again_is_the_same_to_the_byte(name: str, dtype: Any, tmp_path: Path) -> None:
    folder, _ = write_case(name, tmp_path / "run", dtype)
    found = import_folder(folder, tmp_path / "imported")
    assert newest_whole(tmp_path / "imported") == found.checkpoint
    with open_checkpoint(found.checkpoint) as source:
        assert not source.verify() and not source.manifest.has_optimizer
        write_export(tmp_path / "again", source, tiny_tokenizer(), dtype=dtype, shard_bytes=20_000)
    assert files_of(tmp_path / "again") == files_of(folder)


def test_what_a_folder_lacks_comes_from_the_base_or_is_said_to_be_gone(export: Path, tmp_path: Path) -> None:
    folder = trained_elsewhere(export, tmp_path / "tuned")
    tokenizer = export / "tokenizer.model"
    without = import_folder(folder, tmp_path / "without", tokenizer=tokenizer)
    assert without.has_lost_mlm_head and not without.from_base
    model, config = load_omega(tmp_path / "without")
    assert not config.model.mlm_head and config.data.decoder_seq_length == 128
    base = open_export(export)
    whole = import_folder(folder, tmp_path / "whole", tokenizer=tokenizer, base=base)
    base.close()
    assert not whole.has_lost_mlm_head and all(name.startswith("head.mlm.") for name in whole.from_base)
    both, config = load_omega(tmp_path / "whole")
    assert config.model.mlm_head
    torch.testing.assert_close(our_logits(both, ENCODER, DECODER)[0], our_logits(model, ENCODER, DECODER)[0])
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.decoder.*--base"):
        import_folder(
            trained_elsewhere(export, tmp_path / "mlm", "model.decoder"), tmp_path / "no", tokenizer=tokenizer
        )
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_is_needed_and_has_to_be_the_models(export: Path, tmp_path: Path) -> None:
    folder = trained_elsewhere(export, tmp_path / "tuned")
    with pytest.raises(DataError, match="--tokenizer"):
        import_folder(folder, tmp_path / "imported")
    other = tmp_path / "other.model"
    other.write_bytes(tiny_tokenizer().model + b"\x12\x00")
    with pytest.raises(DataError, match="trained with"):
        import_folder(folder, tmp_path / "imported", tokenizer=other)


def change_settings(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return apply


def link_out(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.rename(folder.parent / "elsewhere.safetensors")
    file.symlink_to(folder.parent / "elsewhere.safetensors")


NORM = "model.decoder.norm.weight"
STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another type": (change_settings(model_type="t5"), "of type 't5'"),
    "no sense": (change_settings(num_attention_heads=0), "num_attention_heads"),
    "too many layers": (change_settings(encoder_layers=9999), "more layers than there are tensors"),
    "another width": (change_settings(ffn_hidden_size=64), "its model needs"),
    "other branches": (change_settings(decoder_branches=["causal"]), "its model lacks"),
    "strange branches": (change_settings(decoder_branches=["full"]), "no decoder can use"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{" * 100_000), "cannot be read"),
    "another shape": (change_tensor(NORM, lambda tensor: tensor[:-1]), r"decoder\.norm\.weight as \[31\]"),
    "not finite": (change_tensor(NORM, lambda tensor: tensor / 0), "not finite"),
    "quantised": (change_tensor(NORM, lambda tensor: tensor.to(torch.int8)), "unquantised"),
    "a link": (link_out, "no regular file"),
    "an index that leads out": (
        lambda folder: (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}})),
        "no regular file",
    ),
    "an index of numbers": (
        lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {"a": 1}}'),
        "no weight_map",
    ),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"), "cannot be read"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "is not there"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strangers_folder_is_refused_in_a_sentence(kind: str, export: Path, tmp_path: Path) -> None:
    folder = trained_elsewhere(export, tmp_path / "tuned", leave_out="nothing")
    spoil, message = STRANGE[kind]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        import_folder(folder, tmp_path / "imported", tokenizer=export / "tokenizer.model")
    assert not list(tmp_path.glob("imported/*"))


def test_an_adapter_alone_and_a_folder_that_exists_are_refused(export: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="beside their base"):
        import_folder(tmp_path / "adapter", tmp_path / "imported")
    with pytest.raises(CheckpointError, match="exists"):
        import_folder(export, tmp_path)


def test_an_export_that_was_trained_on_in_place_is_no_export_any_more(export: Path, tmp_path: Path) -> None:
    folder = trained_elsewhere(export, tmp_path / "tuned", leave_out="nothing")
    for name in ("omega.json", "tokenizer.model"):
        (folder / name).write_bytes((export / name).read_bytes())
    for file in export.glob("model-*"):
        (folder / file.name).write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="import-hf"):
        load_omega(folder)
    found = import_folder(folder, tmp_path / "imported")
    weights = open_weights(found.checkpoint)
    expected = load_file(folder / "model.safetensors")[NORM]
    assert torch.equal(weights.tensor("decoder.norm.weight"), expected)
    weights.close()


@pytest.mark.parametrize("comes_from_transformers", [False, True])
def test_a_training_starts_from_an_export_as_from_the_checkpoint_it_was_made_of(
    export: Path, tmp_path: Path, comes_from_transformers: bool
) -> None:
    """The engine's masters are the weights; another model is refused before one is built."""
    folder = export
    if comes_from_transformers:
        folder = tmp_path / "saved"
        folder.mkdir()
        for path in export.iterdir():
            if path.name != "omega.json":
                shutil.copy(path, folder)
    weights = starting_weights(folder)
    assert weights is not None and weights.path == folder
    config = RunConfig.model_validate(open_export(export).config)
    ((masters, working),) = run_ranks(_start_from, 1, folder, config.model.model_dump(mode="json"))
    assert set(masters) == set(weights.names())
    for name in weights.names():
        wanted = weights.tensor(name).float().numpy()
        assert (masters[name] == wanted).all() and (working[name] == wanted).all(), name


def _start_from(folder: Path, model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    engine = start_engine(small_config(model=model))
    weights = starting_weights(folder)
    assert weights is not None
    store = CheckpointStore(
        folder / "none", config=CheckpointConfig(), topology=engine.topology, identity=weights.identity, run_config={},
        initial=weights,
    )  # fmt: skip
    assert store.resolve(folder) == folder and store.load(engine, folder, weights_only=True) == {}
    shapes = {name: weights.shape(name) for name in weights.names()}
    with pytest.raises(CheckpointError, match="belongs to another model"):
        require_same_model(folder, weights.identity | {"tokenizer": "x"}, weights.identity | {"tokenizer": "y"})
    masters = {
        mine.info.name: mine.part(mine.flat).detach().view(shapes[mine.info.name]).numpy().copy()
        for mine in engine_holdings(engine.deepspeed)
    }
    working = {info.name: parameter.detach().numpy().copy() for info, parameter in declared_parameters(engine.module)}
    return masters, working
