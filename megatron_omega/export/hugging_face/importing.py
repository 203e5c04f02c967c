"""A folder that Transformers wrote, trained on there, becomes a checkpoint again: weights alone, for any layout.

The folder may be a stranger's. Its JSON is read into types, its settings are judged before anything is built, weights
come from safetensors of this folder alone, and each has to be there in its shape, finite, and nothing else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_omega import __version__
from megatron_omega.checkpoint.manifest import EngineState, SavedLayout
from megatron_omega.checkpoint.writer import Piece, write_alone
from megatron_omega.config.check.architecture import architecture
from megatron_omega.config.schema import ModelConfig, RunConfig
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import CheckpointError, DataError
from megatron_omega.export.hugging_face.exporting import CONFIG_NAME, MODEL_TYPE
from megatron_omega.export.hugging_face.names import stored_name, stored_shape
from megatron_omega.export.loading import Weights
from megatron_omega.export.native import INDEX_NAME, TOKENIZER_NAME, ExportDescription, is_export, open_export
from megatron_omega.host.regular_files import read_regular
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.drawing import DRAWING_VERSION
from megatron_omega.parallel.parameters import ParameterInfo, declared_parameters
from megatron_omega.parallel.regions import whole

_WEIGHTS_NAME = "model.safetensors"
_ADAPTER_NAME = "adapter_config.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHARD_BYTES = 4 << 30
_MOST_FINDINGS = 5


@dataclass(frozen=True)
class Imported:
    """What an import has made."""

    checkpoint: Path
    num_parameters: int
    from_base: tuple[str, ...]
    """Parameters that the folder lacked, taken from the base."""
    has_lost_mlm_head: bool
    """Whether the folder had none, and no base to take it from."""


class HubFolder:
    """The settings and tensors of a folder of Transformers."""

    def __init__(self, path: Path, settings: dict[str, Any], files: dict[str, str]) -> None:
        self.path = path
        self.settings = settings
        self.files = files
        """Of every stored tensor the file that holds it."""
        self._stack = ExitStack()
        self._opened: dict[str, Any] = {}

    def shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._file(stored).get_slice(stored).get_shape())

    def tensor(self, stored: str) -> Tensor:
        """Return a tensor as fp32. Raises CheckpointError where it cannot be read or is not made of finite numbers."""
        try:
            tensor: Tensor = self._file(stored).get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(stored, error) from None
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path} holds {stored} as {str(tensor.dtype).removeprefix('torch.')}; save it unquantised, in "
                "float32, bfloat16 or float16"
            )
        tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.path} holds {stored} with numbers that are not finite; do not use it")
        return tensor

    def close(self) -> None:
        """Close all files."""
        self._opened.clear()
        self._stack.close()

    def _file(self, stored: str) -> Any:
        name = self.files[stored]
        try:
            if name not in self._opened:
                self._opened[name] = self._stack.enter_context(safe_open(self.path / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise self._unreadable(stored, error) from None
        return self._opened[name]

    def _unreadable(self, stored: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path / self.files[stored]} cannot be read ({error}); tensor {stored}")


def import_folder(
    folder: Path, target: Path, *, tokenizer: Path | None = None, base: Weights | None = None
) -> Imported:
    """Write the weights of `folder` as a checkpoint into the new folder `target`.

    Args:
        tokenizer: the SentencePiece model; the folder's tokenizer.model where it is not given.
        base: gives the parameters that the folder lacks: the MLM head after training as a Seq2SeqLM, the decoder after
            training as a MaskedLM. Without it, a missing MLM head is left out of the model, anything else refused.

    Raises:
        CheckpointError: the folder is not a whole model of this kind, or `target` exists.
        DataError: the tokenizer is missing, or not the model's.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; choose a new folder")
    source = open_folder(folder)
    try:
        model = model_of(source)
        missing_head = model.has_mlm_head and not any(name.startswith("mlm.") for name in source.files)
        if drops_head := missing_head and base is None:
            model = model.model_copy(update={"mlm_head": False})
        config, described = run_of(source, model)
        opened = _tokenizer_of(source, tokenizer, described)
        parameters = parameters_of(source, config)
        from_base = require_parameters(source, parameters, base)
        parts = _parts(source, parameters, base)
        head = _head(config, described, opened)
        path = write_alone(target, parts, head, attachments={TOKENIZER_NAME: opened.model})
    finally:
        source.close()
    return Imported(path, sum(math.prod(info.shape) for info in parameters), from_base, drops_head)


def open_folder(folder: Path) -> HubFolder:
    """Open a folder of Transformers. Raises CheckpointError where it holds no weights of GPT-Omega."""
    if (folder / _ADAPTER_NAME).exists() and not (folder / CONFIG_NAME).exists():
        raise CheckpointError(f"{folder} holds adapters alone; import them beside their base: import-hf --base")
    settings = _read_json(folder / CONFIG_NAME)
    if settings.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{folder / CONFIG_NAME} describes a model of type {settings.get('model_type')!r}; give one of type "
            f"{MODEL_TYPE!r}"
        )
    if (folder / INDEX_NAME).exists():
        files = _read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map of names; save the model again")
    else:
        files = dict.fromkeys(_tensors_in(folder / _WEIGHTS_NAME), _WEIGHTS_NAME)
    for name in {*files.values()}:
        _require_own_file(folder, name)
    return HubFolder(folder, settings, files)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise CheckpointError(f"{file} cannot be read ({reason}); give a folder written by save_pretrained") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; give a folder written by save_pretrained")
    return content


def _tensors_in(file: Path) -> list[str]:
    if not file.is_file():
        raise CheckpointError(f"{file} is not there; save the model with save_pretrained (safetensors)")
    _require_own_file(file.parent, file.name)
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); save the model again") from None


def _require_own_file(folder: Path, name: str) -> None:
    path = folder / name
    if Path(name).name != name or "\0" in name or not path.is_file() or path.resolve().parent != folder.resolve():
        raise CheckpointError(f"{folder} names a file {name!r} that is no regular file in it; do not use it")


def model_of(source: HubFolder) -> ModelConfig:
    """Return the architecture; nothing is built, and no memory taken, for what makes no sense or is not there."""
    given = {name: source.settings[name] for name in ModelConfig.model_fields if name in source.settings}
    try:
        model = ModelConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{source.path / CONFIG_NAME}: {place}: {first['msg']}") from None
    findings = list(architecture(model))
    if model.encoder_layers + model.decoder_layers > len(source.files):
        findings.append(f"it asks for more layers than there are tensors ({len(source.files)})")
    if findings:
        raise CheckpointError(
            *(f"{source.path} cannot be imported: {finding}" for finding in findings[:_MOST_FINDINGS])
        )
    return model


def run_of(source: HubFolder, model: ModelConfig) -> tuple[RunConfig, ExportDescription | None]:
    """Return the settings of the run: the export's, where it still lies there and is of this model."""
    if is_export(source.path):
        description = open_export(source.path).description
        try:
            config = RunConfig.model_validate(description.config)
        except ValidationError:
            config = None
        if config is not None and config.model == model:
            return config, description
    lengths = {
        name: source.settings[key]
        for name, key in (("encoder_seq_length", "max_encoder_length"), ("decoder_seq_length", "max_decoder_length"))
        if key in source.settings
    }
    try:
        return RunConfig.model_validate({"model": model.model_dump(mode="json"), "data": lengths}), None
    except ValidationError as error:
        raise CheckpointError(f"{source.path / CONFIG_NAME}: {error.errors()[0]['msg']}") from None


def _tokenizer_of(source: HubFolder, path: Path | None, described: ExportDescription | None) -> Tokenizer:
    own = source.path / TOKENIZER_NAME
    if path is None and not own.exists():
        raise DataError(
            f"{source.path} has no {TOKENIZER_NAME} (Transformers does not save it again); give the export's with "
            "--tokenizer"
        )
    tokenizer = Tokenizer.open(path or own)
    wanted = [source.settings.get("tokenizer_sha256"), described.identity.get("tokenizer") if described else None]
    if other := [value for value in wanted if value not in (None, tokenizer.fingerprint)]:
        raise DataError(
            f"tokenizer {tokenizer.path} has fingerprint {tokenizer.fingerprint[:12]}, the model in {source.path} was "
            f"trained with {str(other[0])[:12]}; give that tokenizer's file with --tokenizer"
        )
    return tokenizer


def parameters_of(source: HubFolder, config: RunConfig) -> list[ParameterInfo]:
    with torch.device("meta"):
        model = Omega(ModelContext.of(config))
    return list({info.name: info for info, _ in declared_parameters(model)}.values())


def require_parameters(source: HubFolder, parameters: Sequence[ParameterInfo], base: Weights | None) -> tuple[str, ...]:
    """Raise CheckpointError with what is missing, superfluous or of another shape; return what the base gives."""
    wanted = {stored_name(info.name): info for info in parameters}
    missing = [info for stored, info in wanted.items() if stored not in source.files]
    findings = [f"{source.path} holds a tensor {name} that its model lacks" for name in source.files.keys() - wanted]
    findings += [
        f"{source.path} holds {stored} as {list(source.shape(stored))}, its model needs "
        f"{list(stored_shape(info.name, info.shape))}"
        for stored, info in wanted.items()
        if stored in source.files and source.shape(stored) != stored_shape(info.name, info.shape)
    ]
    in_base = {} if base is None else {name: base.shape(name) for name in base.names()}
    findings += [
        f"{source.path} holds no tensor {stored_name(info.name)}; give --base with a model that has it"
        for info in missing
        if in_base.get(info.name) != info.shape
    ]
    if findings:
        raise CheckpointError(f"{findings[0]} (and {len(findings) - 1} more)" if findings[1:] else findings[0])
    return tuple(info.name for info in missing)


def _parts(source: HubFolder, parameters: Sequence[ParameterInfo], base: Weights | None) -> Iterator[list[Piece]]:
    """Yield the pieces of one shard after another."""
    part: list[Piece] = []
    room = _SHARD_BYTES
    for info in parameters:
        size = math.prod(info.shape) * torch.float32.itemsize
        if part and size > room:
            yield part
            part, room = [], _SHARD_BYTES
        part.append(_piece(info, _values(source, info, base)))
        room -= size
    yield part


def _values(source: HubFolder, info: ParameterInfo, base: Weights | None) -> Tensor:
    stored = stored_name(info.name)
    if stored in source.files:
        return source.tensor(stored)
    assert base is not None, "what is missing was compared with the base before"
    return base.tensor(info.name).float()


def _piece(info: ParameterInfo, values: Tensor) -> Piece:
    return Piece(info.name, info.axis, whole(info.shape), 0.0, {"weight": values.reshape(-1)})


def _head(config: RunConfig, described: ExportDescription | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the fields of a manifest that are not about files: an export's own, where they are known."""
    identity: dict[str, JsonValue] = {
        "model": config.model.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint,
        "initialization": DRAWING_VERSION,
    }
    return {
        "step": described.step if described else 0,
        "versions": {"megatron_omega": __version__, "torch": torch.__version__, "safetensors": version("safetensors")},
        "layout": SavedLayout(pipeline=1, data=1, tensor=1, zero_stage=0, dtype="float32"),
        "identity": described.identity if described else identity,
        "config": described.config if described else config.model_dump(mode="json"),
        "state": {},
        "engine": EngineState(global_steps=0, global_samples=0, skipped_steps=0, loss_scaler={}),
        "validation_loss": None,
    }
