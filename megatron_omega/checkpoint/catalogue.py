"""The checkpoints of a folder: which there are, which are whole, which belong to this model, which are kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, ValidationError

from megatron_omega.checkpoint.manifest import FILE_NAME, KINDS, Manifest, encode_manifest, read_manifest
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.writer import HIDDEN_PREFIX, step_folder, sync_folder, write_durably
from megatron_omega.config.schema import CheckpointConfig, ModelConfig
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
    except FileNotFoundError:
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
    if lines := identity_differences(_with_later_settings(manifest.identity, wanted), _binding(wanted)):
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


@dataclass(frozen=True)
class Row:
    """What decides whether a checkpoint is kept."""

    step: int
    validation_loss: float | None
    has_optimizer: bool = True


@dataclass(frozen=True)
class Verdict:
    """Steps to delete, and steps that lose their optimizer state."""

    delete: frozenset[int]
    strip: frozenset[int]


def choose(rows: Iterable[Row], config: CheckpointConfig) -> Verdict:
    """Decide what becomes of the whole checkpoints `rows`. The newest `keep_last` are always kept in full."""
    rows = sorted(rows, key=lambda row: row.step, reverse=True)
    recent = {row.step for row in rows[: config.keep_last]}
    kept = set(recent)
    if config.keep_every_steps:
        kept |= {row.step for row in rows if row.step % config.keep_every_steps == 0}
    scored = [row for row in rows if row.validation_loss is not None]
    if config.keep_best and scored:
        kept.add(min(scored, key=lambda row: (row.validation_loss, -row.step)).step)
    strip = {row.step for row in rows if row.has_optimizer and row.step in kept - recent}
    return Verdict(
        delete=frozenset(row.step for row in rows if row.step not in kept),
        strip=frozenset(strip) if config.drop_optimizer_from_older else frozenset(),
    )


class Keeper:
    """Applies the retention rules to one folder.

    Neither counted nor touched are damaged checkpoints, and those of later steps than the one just saved: a resume has
    passed over them because their bytes are wrong, or they are another run's.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = directory
        self._config = config
        self._rows: dict[str, Row] = {}

    def forget(self, step: int) -> None:
        """Look at the checkpoint of `step` again: it has been replaced."""
        self._rows.pop(step_folder(step), None)

    def tidy(self, newest_step: int) -> None:
        """Delete and strip what the rules say after a save. Raises OSError where the file system refuses."""
        verdict = choose((row for row in self._survey() if row.step <= newest_step), self._config)
        for step in sorted(verdict.strip):
            strip_optimizer(self._directory / step_folder(step))
            self.forget(step)
        for step in sorted(verdict.delete):
            delete_checkpoint(self._directory / step_folder(step))

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps. Raises OSError where the file system refuses."""
        kept = list_checkpoints(self._directory, up_to_step=step)
        for path in list_checkpoints(self._directory):
            if path not in kept:
                self._rows.pop(path.name, None)
                delete_checkpoint(path)

    def _survey(self) -> list[Row]:
        present = {path.name: path for path in list_checkpoints(self._directory)}
        for name, path in present.items():
            if name not in self._rows:
                try:
                    manifest = check_structure(path)
                except CheckpointError as error:
                    logger.warning("%s is damaged and left alone: %s", path, error)
                    continue
                self._rows[name] = Row(manifest.step, manifest.validation_loss, manifest.has_optimizer)
        return [row for name, row in self._rows.items() if name in present]


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint so that, wherever it is interrupted, no half of it is taken for a whole."""
    hidden = path.with_name(f"{HIDDEN_PREFIX}deleted-{path.name}-{os.getpid()}")
    path.rename(hidden)
    sync_folder(path.parent)
    shutil.rmtree(hidden)


def strip_optimizer(path: Path) -> None:
    """Remove the optimizer state from a checkpoint; its weights stay loadable throughout."""
    manifest = read_manifest(path)
    files = [path / shard.optimizer.name for shard in manifest.shards if shard.optimizer is not None]
    staged = path / f".{FILE_NAME}-{os.getpid()}"
    staged.unlink(missing_ok=True)
    write_durably(staged, encode_manifest(_without_optimizer(manifest)))
    staged.replace(path / FILE_NAME)
    sync_folder(path)
    for file in files:
        file.unlink(missing_ok=True)


def _without_optimizer(manifest: Manifest) -> Manifest:
    parameters = {
        name: entry.model_copy(
            update={
                "fragments": tuple(
                    fragment.model_copy(update={"blocks": {KINDS[0]: fragment.blocks[KINDS[0]]}})
                    for fragment in entry.fragments
                )
            }
        )
        for name, entry in manifest.parameters.items()
    }
    shards = tuple(shard.model_copy(update={"optimizer": None}) for shard in manifest.shards)
    return manifest.model_copy(update={"parameters": parameters, "shards": shards})
