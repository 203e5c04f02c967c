"""The checkpoints of a folder: which there are, which are whole, and which belong to this model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue, ValidationError

from megatron_omega.checkpoint.manifest import FILE_NAME, Manifest
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.config.schema import ModelConfig
from megatron_omega.errors import CheckpointError
from megatron_omega.host import run_folder
from megatron_omega.log import get_logger

_STEP_FOLDER = re.compile(r"step-([0-9]{8,})")

logger = get_logger(__name__)


def list_checkpoints(directory: Path, *, up_to_step: int | None = None) -> list[Path]:
    """Return the checkpoint folders of `directory`, newest first; with `up_to_step` none of a later step.

    Whether they are whole is another question.
    """
    try:
        names = [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = {int(match[1]): name for name in names if (match := _STEP_FOLDER.fullmatch(name))}
    return [directory / steps[step] for step in sorted(steps, reverse=True) if up_to_step is None or step <= up_to_step]


def checkpoints_at(path: Path, *, up_to_step: int | None = None) -> list[Path]:
    """Return the checkpoints that `path` may mean, newest first: itself, or those of a checkpoints or a run folder."""
    if (path / FILE_NAME).exists():
        return [path]
    within = [list_checkpoints(path / inner, up_to_step=up_to_step) for inner in ("", run_folder.CHECKPOINTS)]
    return next(filter(None, within), [])


def newest_whole(path: Path) -> Path:
    """Return the newest checkpoint at `path` whose structure is whole, and warn of those passed over.

    Raises:
        CheckpointError: there is none, or none is whole.
    """
    problems: list[str] = []
    for folder in checkpoints_at(path):
        if problems:
            logger.warning("going back to %s: %s", folder.name, problems[-1])
        try:
            check_structure(folder)
            return folder
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(*(problems or [no_checkpoint(path)]))


def no_checkpoint(path: Path) -> str:
    """Say that `path` is nothing to load from."""
    problem = "holds no checkpoint" if path.exists() else "does not exist"
    return f"{path} {problem}; give a run folder, its checkpoints folder, a step-... folder or an export"


def check_structure(path: Path) -> Manifest:
    """Check everything of a checkpoint but the tensors' bytes. Raises CheckpointError with what is wrong."""
    with open_checkpoint(path) as reader:
        reader.check_files()
        manifest = reader.manifest
    if (match := _STEP_FOLDER.fullmatch(path.name)) and int(match[1]) != manifest.step:
        raise CheckpointError(f"{path / FILE_NAME} is of step {manifest.step}, not of the folder it lies in")
    return manifest


def identity_differences(
    saved: Mapping[str, JsonValue], wanted: Mapping[str, JsonValue], prefix: str = ""
) -> list[str]:
    """Return one line for each field in which two identities differ."""
    lines = []
    for key in sorted(saved.keys() | wanted.keys()):
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += identity_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} is {old!r} in the checkpoint and {new!r} in this run")
    return lines


def require_identity(path: Path, manifest: Manifest, wanted: Mapping[str, JsonValue]) -> None:
    """Raise CheckpointError, with every differing field, where the checkpoint belongs to another model."""
    require_same_model(path, manifest.identity, _binding(wanted))


def require_same_model(path: Path, saved: Mapping[str, JsonValue], wanted: Mapping[str, JsonValue]) -> None:
    """Raise CheckpointError, with every differing field, where what is saved belongs to another model.

    Weights that are no checkpoint may not know their tokenizer; then it is not compared.
    """
    wanted = {name: value for name, value in _binding(wanted).items() if name in saved or name != "tokenizer"}
    if lines := identity_differences(_with_later_settings(saved, wanted), wanted):
        raise CheckpointError(
            f"{path} belongs to another model: {lines[0]}; "
            "use the configuration it was saved with, or another run folder",
            *lines[1:],
        )


def _binding(identity: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return what two must share: not how first weights are drawn, which a checkpoint's own weights replace."""
    return {name: value for name, value in identity.items() if name != "initialization"}


def _with_later_settings(saved: Mapping[str, JsonValue], wanted: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a saved identity with those settings of `wanted` that its version had no name for, as it acted then."""
    old, new = saved.get("model"), wanted.get("model")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return _binding(saved)
    try:
        meant = ModelConfig.model_validate(old).model_dump(mode="json")
    except ValidationError:  # of a later version: its differences are told as they are
        return _binding(saved)
    return {**_binding(saved), "model": {name: meant[name] for name in new if name in meant} | old}
