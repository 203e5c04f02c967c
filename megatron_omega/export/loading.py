"""Load a checkpoint or an export as one model with its tokenizer: an Omega, filled by canonical names.

The folder may be a checkpoint of any layout, a run, or an export. The model is built without memory and filled tensor
by tensor, so that no weight is ever held twice. It is whole, or a tensor-parallel rank's slice: then no more is read
than that (of an export, no more is kept: its checksums are those of whole tensors).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from pydantic import JsonValue, ValidationError
from torch import Tensor, nn

from megatron_omega.checkpoint.catalogue import checkpoints_at, no_checkpoint
from megatron_omega.config.check.architecture import architecture
from megatron_omega.config.schema import LoraConfig, ModelConfig, RunConfig
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import CheckpointError, ConfigError, DataError
from megatron_omega.export.adapted import open_whole
from megatron_omega.export.native import TOKENIZER_NAME, is_export, open_export, settings_of
from megatron_omega.log import get_logger
from megatron_omega.model.context import ModelContext
from megatron_omega.model.kernels import select_kernels
from megatron_omega.model.omega import Omega
from megatron_omega.parallel.parameters import ParameterInfo, declared_parameters, describe, replacement
from megatron_omega.parallel.tensor_parallel import SERIAL, TensorParallel

logger = get_logger(__name__)
_SMALLEST_ELEMENT_BYTES = 2
_MOST_FINDINGS = 5
Found = TypeVar("Found")


class Weights(Protocol):
    """Named tensors and what they were trained with: a checkpoint, or an export."""

    path: Path

    @property
    def config(self) -> dict[str, JsonValue]: ...

    @property
    def identity(self) -> dict[str, JsonValue]: ...

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def part(self, name: str, axis: int, start: int, stop: int) -> Tensor: ...

    def tensor(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TextModel:
    """A model and the tokenizer it was trained with."""

    model: Omega
    config: RunConfig
    tokenizer: Tokenizer
    path: Path
    """The folder the weights were read from."""

    @property
    def device(self) -> torch.device:
        return self.model.table.weight.device


def load_omega(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Omega, RunConfig]:
    """Load the model at `path`, for evaluation, without gradients or recomputation.

    Args:
        path: a step-... folder, a checkpoints folder or a run folder (the newest valid checkpoint), or an export.

    Raises:
        CheckpointError: there is none, none is whole, or it does not hold the parameters of its own configuration.
        ConfigError: there is no such device.
    """
    place = usable_device(device)
    return _with_newest(Path(path), lambda weights: build_omega(weights, place, dtype))


def load_text_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokenizer: Path | str | None = None,
    parallel: TensorParallel = SERIAL,
) -> TextModel:
    """Load model and tokenizer; the run's own tokenizer where no other file is named. `parallel` says which slice.

    Raises:
        CheckpointError: as `load_omega`.
        ConfigError: there is no such device, or the ranks cannot share the heads evenly.
        DataError: the tokenizer is missing, or not the one that the model was trained with.
    """

    place = usable_device(device)

    def load(weights: Weights) -> TextModel:
        opened = open_tokenizer(weights, tokenizer)
        model, config = build_omega(weights, place, dtype, parallel)
        return TextModel(model, config, opened, weights.path)

    return _with_newest(Path(path), load)


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device called `name`; raise `ConfigError` where this machine has none such."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device {name} cannot be used here ({reason}); use cpu, or cuda on a machine with a GPU"
        ) from None
    return device


def open_tokenizer(weights: Weights, path: Path | str | None = None) -> Tokenizer:
    """Open the tokenizer at `path`, or the run's, and compare its fingerprint with that of the weights."""
    own = weights.path / TOKENIZER_NAME
    tokenizer = Tokenizer.open(path or (own if own.exists() else settings_of(weights).data.tokenizer))
    wanted = weights.identity.get("tokenizer")
    if tokenizer.fingerprint != wanted:
        raise DataError(
            f"tokenizer {tokenizer.path} has fingerprint {tokenizer.fingerprint[:12]}, the model in {weights.path} was "
            f"trained with {str(wanted)[:12]}; give that tokenizer's file with --tokenizer"
        )
    return tokenizer


def build_omega(
    weights: Weights, device: torch.device, dtype: torch.dtype, parallel: TensorParallel = SERIAL
) -> tuple[Omega, RunConfig]:
    """Build the model of `weights`, or this rank's slice, and fill every parameter by its canonical name."""
    config = settings_of(weights)
    _require_sense(config, weights)
    _require_even(config.model, parallel)
    model = _empty_omega(config, device, parallel)
    _require_same_parameters(model, weights)
    return fill_omega(model, lambda info: _values(weights, info), device, dtype), config


def omega_of(
    config: RunConfig,
    values: Callable[[ParameterInfo], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    parallel: TensorParallel = SERIAL,
) -> Omega:
    """Build the model of a configuration, or this rank's slice, from the values of each parameter, asked for in order.

    Adapters are none of it: `values` has them merged in.
    """
    plain = config.model_copy(update={"lora": LoraConfig()})
    return fill_omega(_empty_omega(plain, device, parallel), values, device, dtype)


def _empty_omega(config: RunConfig, device: torch.device, parallel: TensorParallel) -> Omega:
    context = ModelContext.of(config, parallel, select_kernels(device.type))
    with torch.device("meta"):
        return Omega(replace(context, recompute="none"))


def fill_omega(
    model: Omega, values: Callable[[ParameterInfo], Tensor], device: torch.device, dtype: torch.dtype
) -> Omega:
    """Put `values` in the place of every parameter of a model that was built without memory."""
    filled: dict[str, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            info = describe(parameter)
            if info.name not in filled:  # the token table has several places
                filled[info.name] = replacement(parameter, values(info).to(device, dtype))
            setattr(module, key, filled[info.name])
    return model.eval()


def _values(weights: Weights, info: ParameterInfo) -> Tensor:
    """Read what this rank holds of a parameter."""
    if info.axis is None or info.stop - info.start == info.shape[info.axis]:
        return weights.tensor(info.name)
    return weights.part(info.name, info.axis, info.start, info.stop)


def _require_even(model: ModelConfig, parallel: TensorParallel) -> None:
    if model.num_attention_heads % parallel.size:
        raise ConfigError(
            f"{model.num_attention_heads} attention heads cannot be shared by {parallel.size} tensor-parallel ranks; "
            "start as many ranks as divide the heads"
        )


def find_weights(path: Path) -> list[Path]:
    """Return the folders that `path` may mean, the best first. Raises CheckpointError where there is none."""
    found = [path] if is_export(path) else checkpoints_at(path)
    if not found:
        raise CheckpointError(no_checkpoint(path))
    return found


def open_weights(folder: Path) -> Weights:
    """Open a checkpoint or an export; adapters come merged into their base."""
    return open_export(folder) if is_export(folder) else open_whole(folder)


def _with_newest(path: Path, use: Callable[[Weights], Found]) -> Found:
    """Use the newest checkpoint that is whole, and say which ones are not."""
    problems: list[str] = []
    for folder in find_weights(path):
        if problems:
            logger.warning("going back to %s: %s", folder.name, problems[-1])
        try:
            weights = open_weights(folder)
            try:
                return use(weights)
            finally:
                weights.close()
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(*problems)


def _require_sense(config: RunConfig, weights: Weights) -> None:
    """Raise CheckpointError where a model of this configuration cannot be what the folder holds.

    The configuration may be a stranger's: no layer is built and no memory taken for what is not there.
    """
    findings = list(architecture(config.model))
    saved = weights.identity.get("model")
    if not isinstance(saved, dict) or _model_differs(saved, config):
        findings.append("its configuration describes another model than its identity")
    if config.model.encoder_layers + config.model.decoder_layers > len(weights.names()):
        findings.append(f"its configuration asks for more layers than there are parameters ({len(weights.names())})")
    promised = sum(math.prod(weights.shape(name)) for name in weights.names()) * _SMALLEST_ELEMENT_BYTES
    folders = getattr(weights, "folders", (weights.path,))  # adapters and their base lie in two
    present = sum(file.stat().st_size for folder in folders for file in folder.iterdir() if file.is_file())
    if promised > present:
        findings.append(f"its parameters need {promised:,} bytes or more, its files hold {present:,}")
    if findings:
        raise CheckpointError(*(f"{weights.path} cannot be loaded: {finding}" for finding in findings[:_MOST_FINDINGS]))


def _model_differs(saved: dict[str, JsonValue], config: RunConfig) -> bool:
    try:
        return ModelConfig.model_validate(saved) != config.model
    except ValidationError:
        return True


def _require_same_parameters(model: Omega, weights: Weights) -> None:
    shapes = {info.name: info.shape for info, _ in declared_parameters(model)}
    wanted, found = set(shapes), set(weights.names())
    findings = [f"{weights.path} holds no parameter {name}" for name in sorted(wanted - found)]
    findings += [f"{weights.path} holds a parameter {name} that its model lacks" for name in sorted(found - wanted)]
    findings += [
        f"{weights.path} holds {name} as {list(weights.shape(name))}, its model needs {list(shapes[name])}"
        for name in sorted(wanted & found)
        if tuple(weights.shape(name)) != shapes[name]
    ]
    if findings:
        raise CheckpointError(f"{findings[0]} (and {len(findings) - 1} more); use the version that wrote it")
