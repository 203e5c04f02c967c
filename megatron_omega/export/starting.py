"""Weights that a training starts from and that are no checkpoint: an export, or a folder that Transformers wrote."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import JsonValue
from torch import Tensor

from megatron_omega.checkpoint.initial import InitialWeights
from megatron_omega.errors import ConfigError
from megatron_omega.export.hugging_face.exporting import CONFIG_NAME, MODEL_TYPE
from megatron_omega.export.hugging_face.importing import (
    HubFolder,
    model_of,
    open_folder,
    parameters_of,
    require_parameters,
    run_of,
)
from megatron_omega.export.hugging_face.names import stored_name
from megatron_omega.export.native import is_export, open_export
from megatron_omega.host.regular_files import read_text


def starting_weights(path: Path | str | None) -> InitialWeights | None:
    """Open the weights at `path`; None if there are none of this kind, so that it is a checkpoint or nothing.

    Raises CheckpointError if they cannot be read, or are not whole.
    """
    if path is None:
        return None
    folder = Path(path).absolute()
    if is_export(folder):
        return open_export(folder)
    return HubWeights(open_folder(folder)) if _is_of_transformers(folder) else None


def require_no_adapters(path: Path | str) -> None:
    """Raise ConfigError: adapters are known by the checksums of a checkpoint that they stand beside."""
    raise ConfigError(
        f"checkpoint.load={path} is no checkpoint, and adapters (lora.rank) stand beside one; make it one first: "
        f"megatron-omega import-hf --folder {path} --output FOLDER"
    )


def _is_of_transformers(folder: Path) -> bool:
    try:
        settings = json.loads(read_text(folder / CONFIG_NAME))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("model_type") == MODEL_TYPE


class HubWeights:
    """A folder of Transformers under canonical names."""

    def __init__(self, folder: HubFolder) -> None:
        self.path, self._folder = folder.path, folder
        model = model_of(folder)
        if model.has_mlm_head and not any(name.startswith("mlm.") for name in folder.files):
            model = model.model_copy(update={"mlm_head": False})
        config, _ = run_of(folder, model)
        parameters = parameters_of(folder, config)
        require_parameters(folder, parameters, None)
        self._shapes = {info.name: info.shape for info in parameters}
        tokenizer = folder.settings.get("tokenizer_sha256")
        known: dict[str, JsonValue] = {} if tokenizer is None else {"tokenizer": tokenizer}
        self.identity: dict[str, JsonValue] = {"model": config.model.model_dump(mode="json"), **known}
        """Of the tokenizer nothing, if the folder does not say which it was."""

    def names(self) -> tuple[str, ...]:
        """Return the canonical names of all parameters."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._shapes[name]

    def tensor(self, name: str) -> Tensor:
        """Return a parameter as fp32. Raises CheckpointError if it cannot be read, or is not finite."""
        return self._folder.tensor(stored_name(name)).view(self._shapes[name])

    def close(self) -> None:
        """Close all files."""
        self._folder.close()
