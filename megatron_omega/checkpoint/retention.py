"""Which checkpoints of a folder are kept, which lose their optimizer state, which are deleted; and doing it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_omega.checkpoint.catalogue import check_structure, list_checkpoints
from megatron_omega.checkpoint.manifest import FILE_NAME, KINDS, Manifest, encode_manifest, read_manifest
from megatron_omega.checkpoint.writer import HIDDEN_PREFIX, step_folder, sync_folder, write_durably
from megatron_omega.config.schema import CheckpointConfig
from megatron_omega.errors import CheckpointError
from megatron_omega.log import get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Row:
    """What decides whether a checkpoint is kept."""

    step: int
    validation_loss: float | None
    has_optimizer: bool = True
    score: float | None = None
    """Of its answers; higher is better."""

    @property
    def merit(self) -> tuple[float, float, int]:
        """Largest for the best validation: by its score, then by its loss; of equal ones the earlier."""
        assert self.validation_loss is not None
        return (-math.inf if self.score is None else self.score, -self.validation_loss, -self.step)


@dataclass(frozen=True)
class Choice:
    """Steps to delete, and steps that lose their optimizer state."""

    delete: frozenset[int]
    strip: frozenset[int]


def choose(rows: Iterable[Row], config: CheckpointConfig) -> Choice:
    """Decide what becomes of the whole checkpoints `rows`. The newest `keep_last` are always kept in full."""
    rows = sorted(rows, key=lambda row: row.step, reverse=True)
    recent = {row.step for row in rows[: config.keep_last]}
    kept = set(recent)
    if config.keep_every_steps:
        kept |= {row.step for row in rows if row.step % config.keep_every_steps == 0}
    scored = [row for row in rows if row.validation_loss is not None]
    if config.keep_best and scored:
        kept.add(max(scored, key=lambda row: row.merit).step)
    strip = {row.step for row in rows if row.has_optimizer and row.step in kept - recent}
    return Choice(
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
        """Delete and strip what the rules say after a save. Raises OSError if the file system refuses."""
        chosen = choose((row for row in self._survey() if row.step <= newest_step), self._config)
        for step in sorted(chosen.strip):
            strip_optimizer(self._directory / step_folder(step))
            self.forget(step)
        for step in sorted(chosen.delete):
            delete_checkpoint(self._directory / step_folder(step))

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps. Raises OSError if the file system refuses."""
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
                score = manifest.state.get("score") if manifest.validation_loss is not None else None
                known = float(score) if isinstance(score, int | float) else None
                self._rows[name] = Row(manifest.step, manifest.validation_loss, manifest.has_optimizer, known)
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
