"""Adapters in PEFT's own format: out of a checkpoint of adapters, and back into one that trains on under any layout.

    adapter_config.json           rank, alpha, and the products that have an adapter
    adapter_model.safetensors     base_model.model.model.decoder.layers.0.cross.q.lora_A.weight [r, in], lora_B [out, r]
    README.md                     how both are loaded

The folder that comes back may be a stranger's: what it says is read into types, and each tensor has to be there in its
shape, finite, and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_omega import __version__
from megatron_omega.checkpoint.adapters import IDENTITY, Base, adapter_identity, find_base
from megatron_omega.checkpoint.manifest import EngineState, Manifest, SavedLayout
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.writer import HIDDEN_PREFIX, Piece, sync_folder, write_alone, write_durably
from megatron_omega.config.schema import ADAPTER_TARGETS, AdapterTarget, LoraConfig, RunConfig
from megatron_omega.errors import CheckpointError
from megatron_omega.export.adapted import AdaptedReader
from megatron_omega.export.hugging_face.names import stored_name
from megatron_omega.export.loading import open_tokenizer
from megatron_omega.export.native import TOKENIZER_NAME, publish, settings_of
from megatron_omega.host.regular_files import read_regular
from megatron_omega.model.adapters import LORA_A, LORA_B, SUFFIX, initial_deviation, is_adapter, target_of
from megatron_omega.model.context import ModelContext
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.drawing import normal_slice
from megatron_omega.parallel.parameters import ParameterInfo, declared_parameters
from megatron_omega.parallel.regions import whole

SETTINGS_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {LORA_A: "lora_A", LORA_B: "lora_B"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BASE = "base"
"""Entry of the file's own metadata: the checksum of the weights that the adapters were trained beside."""
_PRODUCTS: Mapping[AdapterTarget, tuple[str, ...]] = {
    "qkv": ("attention.qkv",),
    "out": ("attention.out",),
    "gate_up": ("feed_forward.gate_up",),
    "down": ("feed_forward.down",),
    "cross": ("cross.q", "cross.kv", "cross.out"),
}
"""Modules of the exported model that each target is, as PEFT finds them: by the end of their name."""


class _Settings(BaseModel):
    """What an adapter_config.json says that decides about the adapters; all else there is about their training."""

    peft_type: Literal["LORA"]
    r: int = Field(ge=1, lt=1 << 20)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    @property
    def alpha(self) -> float:
        """Ours: the output is scaled by alpha / rank, and by alpha / sqrt(rank) if it is rank-stabilised."""
        return self.lora_alpha * math.sqrt(self.r) if self.use_rslora else self.lora_alpha

    @property
    def unknown(self) -> str | None:
        """What they have that ours have not."""
        beyond = {
            "use_dora": self.use_dora,
            "bias": self.bias != "none",
            "lora_bias": self.lora_bias,
            "fan_in_fan_out": self.fan_in_fan_out,
            "modules_to_save": self.modules_to_save,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        return next((name for name, value in beyond.items() if value), None)


@dataclass(frozen=True)
class ImportedAdapters:
    """What an import has made."""

    checkpoint: Path
    lora: LoraConfig
    num_parameters: int
    num_new: int
    """Adapters that the folder lacked, of targets of which it has others; they begin as nothing."""


def adapter_key(name: str) -> str:
    """Return what PEFT calls an adapter's parameter.

    >>> adapter_key("decoder.layers.0.cross.q.lora_a.weight")
    'base_model.model.model.decoder.layers.0.cross.q.lora_A.weight'
    """
    stem, _, part = name.removesuffix(SUFFIX).rpartition(".")
    return f"{_PREFIX}{stored_name(f'{stem}.{_PARTS[part]}{SUFFIX}')}"


def stored_adapter(name: str, tensor: Tensor) -> Tensor:
    """Return an adapter as the matrix that PEFT has: A [r, in], B [out, r]."""
    is_first = name.endswith(f"{LORA_A}{SUFFIX}")
    return tensor.reshape(len(tensor), -1) if is_first else tensor.reshape(-1, tensor.shape[-1])


def write_adapters(target: Path, source: AdaptedReader, *, base_name: str | None = None) -> int:
    """Write the adapters of a checkpoint into the new folder `target`; return their number of parameters.

    base_name: where PEFT finds the exported base by itself, a folder or a name of the hub.

    Raises CheckpointError if the folder exists or cannot be written, if the checkpoint is damaged, or if it holds more
    than adapters.
    """
    if source.lora.also:
        raise CheckpointError(
            f"{source.path} was trained with lora.also=[{', '.join(source.lora.also)}]: more differs from its "
            "base than adapters; export the whole model (without --adapters)"
        )
    if target.exists():
        raise CheckpointError(f"{target} exists; choose a new folder")
    tensors = {adapter_key(name): stored_adapter(name, tensor) for name, tensor in source.adapters()}
    staging = target.with_name(f"{HIDDEN_PREFIX}{target.name}-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        metadata = {"format": "pt", _BASE: source.base_fingerprint}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, staging / WEIGHTS_NAME, metadata)
        publish(staging / WEIGHTS_NAME)
        settings = json.dumps(adapter_settings(settings_of(source), source.lora, base_name), indent=2) + "\n"
        write_durably(staging / SETTINGS_NAME, settings.encode())
        write_durably(staging / "README.md", _card(settings_of(source)).encode())
        sync_folder(staging)
        staging.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}; free space or choose a place") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _require_written(target, tensors)
    return sum(tensor.numel() for tensor in tensors.values())


def adapter_settings(config: RunConfig, lora: LoraConfig, base_name: str | None) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    is_decoder_only = config.model.is_decoder_only
    targets: list[AdapterTarget] = [target for target in lora.targets if not (is_decoder_only and target == "cross")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_decoder_only else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(module for target in targets for module in _PRODUCTS[target]),
    }


def _card(config: RunConfig) -> str:
    kind = "AutoModelForCausalLM" if config.model.is_decoder_only else "AutoModelForSeq2SeqLM"
    return f"""# Adapters of GPT-Omega

Low-rank adapters (LoRA) in PEFT's format. They belong to one base, whose export Transformers loads:

```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained("EXPORT_OF_THE_BASE", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

`megatron-omega import-hf --folder THIS_FOLDER --base RUN --output runs/adapters` makes a checkpoint of them again.
"""


def _require_written(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read everything back and compare it, bit for bit."""
    with _opened(folder) as file:
        if {*file.keys()} != {*tensors} or not all(torch.equal(file.get_tensor(key), tensors[key]) for key in tensors):
            raise CheckpointError(f"{folder} does not say what the checkpoint says; do not use it")


def _opened(folder: Path) -> Any:
    path = folder / WEIGHTS_NAME
    if not path.is_file() or path.resolve().parent != folder.resolve():
        raise CheckpointError(f"{path} is not there; save the adapters with save_pretrained (safetensors)")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); save the adapters again") from None


def import_adapters(folder: Path, target: Path, base: Path, tokenizer: Path | None = None) -> ImportedAdapters:
    """Write the adapters of a PEFT folder as a checkpoint of adapters beside `base` into the new folder `target`.

    tokenizer: the base's, if it does not carry it.

    Raises CheckpointError if the folder holds no LoRA that ours can be, if the base is not a whole model's checkpoint,
    or if `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; choose a new folder")
    settings = _read_settings(folder)
    found = find_base(base)
    if found.adapters is not None:
        raise CheckpointError(f"{base} holds adapters itself; give the whole model that the adapters were made beside")
    with open_checkpoint(found.weights) as reader:
        manifest, config = reader.manifest, settings_of(reader)
        attachments = {TOKENIZER_NAME: open_tokenizer(reader, tokenizer).model}
    with _opened(folder) as file:
        _require_its_base(file, found, folder)
        lora = LoraConfig(rank=settings.r, alpha=settings.alpha, targets=_targets(file, folder, config))
        infos = _adapters_of(config, lora)
        _require_tensors(file, folder, infos)
        missing = [info for info in infos if adapter_key(info.name) not in file.keys()]  # noqa: SIM118 (no mapping)
        pieces = [_piece(info, _values(file, folder, info, config.training.seed)) for info in infos]
        head = _head(manifest, found, config, lora)
        path = write_alone(target, [pieces], head, attachments=attachments)
    return ImportedAdapters(path, lora, sum(math.prod(info.shape) for info in infos), len(missing) // 2)


def _read_settings(folder: Path) -> _Settings:
    path = folder / SETTINGS_NAME
    try:
        found = _Settings.model_validate(json.loads(read_regular(path)))
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; give LoRA's") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise CheckpointError(f"{path} cannot be read ({reason}); give a folder written by save_pretrained") from None
    if found.unknown is not None:
        raise CheckpointError(
            f"{path} has {found.unknown}, which adapters here have not; merge it there (model.merge_and_unload()) and "
            "import the whole model"
        )
    return found


def _require_its_base(file: Any, base: Base, folder: Path) -> None:
    """Raise CheckpointError if the file says that it was made beside other weights; a stranger's does not say."""
    named = (file.metadata() or {}).get(_BASE)
    if named is not None and named != base.fingerprint:
        raise CheckpointError(
            f"the adapters in {folder} were trained beside other weights than those of {base.weights}; give that model "
            "with --base"
        )


def _targets(file: Any, folder: Path, config: RunConfig) -> tuple[AdapterTarget, ...]:
    """Return the targets that have an adapter; raise CheckpointError for what can have none here."""
    known = {adapter_key(info.name): info.name for info in _adapters_of(config, LoraConfig(rank=1))}
    strangers = [key for key in file.keys() if key not in known]  # noqa: SIM118 (no mapping)
    if strangers:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} holds {strangers[0]} (and {len(strangers) - 1} more), which no adapter of this "
            "model is; train there with target_modules of attention.qkv, attention.out, feed_forward.gate_up, "
            "feed_forward.down, cross.q, cross.kv, cross.out, or merge the adapters and import the whole model"
        )
    found = {target_of(_beside(known[key])) for key in file.keys()}  # noqa: SIM118
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} is empty; save the adapters again")
    return tuple(target for target in ADAPTER_TARGETS if target in found)


def _beside(name: str) -> str:
    """Return the weight that an adapter stands beside."""
    return name.removesuffix(SUFFIX).rpartition(".")[0] + SUFFIX


def _adapters_of(config: RunConfig, lora: LoraConfig) -> list[ParameterInfo]:
    with torch.device("meta"):
        model = Omega(replace(ModelContext.of(config), lora=lora))
    return [info for info, _ in declared_parameters(model) if is_adapter(info.name)]


def _require_tensors(file: Any, folder: Path, infos: Sequence[ParameterInfo]) -> None:
    keys = {*file.keys()}
    findings = list(_wrong_shapes(file, infos, keys))
    halves = [info.name for info in infos if (adapter_key(info.name) in keys) != (_other_half(info.name) in keys)]
    findings += [f"of the adapter of {_beside(name)} only one half is there" for name in halves[::2]]
    if findings:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} {findings[0]}" + (f" (and {len(findings) - 1} more)" if findings[1:] else "")
        )


def _wrong_shapes(file: Any, infos: Sequence[ParameterInfo], keys: set[str]) -> Iterator[str]:
    for info in infos:
        key = adapter_key(info.name)
        wanted = list(stored_adapter(info.name, torch.empty(info.shape, device="meta")).shape)
        if key in keys and (shape := list(file.get_slice(key).get_shape())) != wanted:
            yield f"holds {key} as {shape}, the model and its rank need {wanted}"


def _other_half(name: str) -> str:
    old, new = (LORA_A, LORA_B) if name.endswith(f"{LORA_A}{SUFFIX}") else (LORA_B, LORA_A)
    return adapter_key(name.removesuffix(f"{old}{SUFFIX}") + new + SUFFIX)


def _values(file: Any, folder: Path, info: ParameterInfo, seed: int) -> Tensor:
    """Return what the folder has of a parameter, fp32; else what a new adapter begins with."""
    key = adapter_key(info.name)
    if key not in file.keys():  # noqa: SIM118 (no mapping)
        if not info.name.endswith(f"{LORA_A}{SUFFIX}"):
            return torch.zeros(info.shape)
        return normal_slice(seed, info.name, info.shape) * initial_deviation(info.shape)
    try:
        tensor: Tensor = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} cannot be read ({error}); tensor {key}") from None
    if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} holds {key} with numbers that are not finite, or not of 16 or 32 bits; do not "
            "use it"
        )
    return tensor.float().reshape(info.shape)


def _piece(info: ParameterInfo, values: Tensor) -> Piece:
    return Piece(info.name, info.axis, whole(info.shape), 0.0, {"weight": values.contiguous().reshape(-1)})


def _head(manifest: Manifest, base: Base, config: RunConfig, lora: LoraConfig) -> dict[str, Any]:
    """Return the fields of a manifest that are not about files."""
    checkpoint = config.checkpoint.model_copy(update={"load": str(base.weights.absolute()), "load_weights_only": True})
    run = config.model_copy(update={"lora": lora, "checkpoint": checkpoint})
    identity: dict[str, JsonValue] = {**manifest.identity, IDENTITY: adapter_identity(lora, base)}
    return {
        "step": 0,
        "versions": {"megatron_omega": __version__, "torch": torch.__version__, "safetensors": version("safetensors")},
        "layout": SavedLayout(pipeline=1, data=1, tensor=1, zero_stage=0, dtype="float32"),
        "identity": identity,
        "config": run.model_dump(mode="json"),
        "state": {},
        "engine": EngineState(global_steps=0, global_samples=0, skipped_steps=0, loss_scaler={}),
        "validation_loss": None,
    }
