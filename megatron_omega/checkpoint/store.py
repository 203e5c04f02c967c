"""The checkpoints of a run: saved from and loaded into a live engine, in the background, newest valid first."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from pydantic import JsonValue

from megatron_omega import __version__
from megatron_omega.checkpoint.adapters import Base, fill_from_base
from megatron_omega.checkpoint.catalogue import check_structure, checkpoints_at, require_identity, require_same_model
from megatron_omega.checkpoint.counters import read_counters, restore_counters
from megatron_omega.checkpoint.initial import InitialWeights, fill_weights
from megatron_omega.checkpoint.live_state import Binding, filling, require_same_parameters, restore_adam_steps
from megatron_omega.checkpoint.live_weights import LiveWeights
from megatron_omega.checkpoint.manifest import KINDS, Kind, Manifest, SavedLayout
from megatron_omega.checkpoint.reader import open_checkpoint
from megatron_omega.checkpoint.retention import Keeper
from megatron_omega.checkpoint.writer import Snapshot, remove_unfinished, step_folder, write_checkpoint
from megatron_omega.config.schema import CheckpointConfig
from megatron_omega.engine.engine import Engine
from megatron_omega.engine.internals import check_masters, refresh_working_weights
from megatron_omega.errors import CheckpointError
from megatron_omega.log import get_logger
from megatron_omega.parallel.exchange import Peers
from megatron_omega.parallel.topology import Topology

logger = get_logger(__name__)

JSON = JsonValue


class CheckpointStore:
    """Saves and loads the checkpoints of one run folder. Every method but `wait` is collective over all ranks."""

    def __init__(
        self,
        directory: Path,
        *,
        config: CheckpointConfig,
        topology: Topology,
        identity: Mapping[str, JSON],
        run_config: Mapping[str, JSON],
        timeout: timedelta = timedelta(minutes=30),
        on_failure: Callable[[CheckpointError], None] | None = None,
        attachments: Mapping[str, bytes] = MappingProxyType({}),
        initial: InitialWeights | None = None,
    ) -> None:
        """`attachments` are further files of each checkpoint, by name, such as the tokenizer.

        `initial` are the weights of `config.load`, if those are no checkpoint.

        `timeout` bounds how long a rank waits for another; `on_failure` is told, on every rank, of failed saves.
        """
        self.directory = Path(directory)
        self._config = config
        self._topology = topology
        self._identity = dict(identity)
        self._run_config = dict(run_config)
        self._on_failure = on_failure
        self._attachments = attachments
        self._initial = initial
        self.peers = Peers(timeout=timeout)
        self._token = str(self.peers.agree(secrets.token_hex(4)))
        self._keeper = Keeper(self.directory, config)
        self._binding: Binding | None = None
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._is_tidy = False

    # ---- saving

    def save(
        self,
        engine: Engine,
        state: Mapping[str, JSON],
        *,
        step: int,
        asynchronous: bool | None = None,
        validation_loss: float | None = None,
    ) -> None:
        """Save the whole training state as the checkpoint of `step`.

        Asynchronously (the default follows the configuration) training waits for one copy to memory only. A save that
        fails is logged, cleaned up and returned by the next `wait`; it raises nothing here.
        """
        self.wait()
        if not self._is_tidy and self.peers.is_first:
            remove_unfinished(self.directory, token=self._token)
        self._is_tidy = True
        in_background = self._config.asynchronous if asynchronous is None else asynchronous
        binding = self._bind(engine)
        head = self._head(engine, state, step, validation_loss)
        snapshot = Snapshot(binding.pieces(copy=in_background), head, self._attachments)
        if not in_background:
            self._write(snapshot)
            return
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name=f"checkpoint-{step}")
        self._thread.start()

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: what a run that went back to `step` must not resume from.

        Raises CheckpointError, and deletes nothing, where `step` itself has no whole checkpoint.
        """
        self.wait()
        problems = self.peers.agree(self._forget_after(step) if self.peers.is_first else None)
        if problems:
            raise CheckpointError(*cast(list[str], problems))

    def _forget_after(self, step: int) -> JSON:
        try:
            check_structure(self.directory / step_folder(step))
            self._keeper.delete_after(step)
        except CheckpointError as error:
            return list(error.findings)
        except OSError as error:
            return [f"later checkpoints could not be removed: {error}"]
        return []

    def wait(self) -> CheckpointError | None:
        """Finish the save in progress; return the error of the last save, once, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _bind(self, engine: Engine) -> Binding:
        if self._binding is None or self._binding.engine is not engine.deepspeed:
            self._binding = Binding(engine.deepspeed, self.peers, self._topology)
            check_masters(self._binding.holdings)
        return self._binding

    def _head(
        self, engine: Engine, state: Mapping[str, JSON], step: int, validation_loss: float | None
    ) -> dict[str, Any]:
        layout = self._topology.layout
        dtype = str(next(engine.module.parameters()).dtype).removeprefix("torch.")
        versions = {"megatron_omega": __version__, "torch": torch.__version__, "deepspeed": version("deepspeed")}
        return {
            "step": step,
            "versions": versions,
            "layout": SavedLayout(
                pipeline=layout.pipeline, data=layout.data, tensor=layout.tensor,
                zero_stage=engine.deepspeed.zero_optimization_stage(), dtype=dtype,
            ),
            "identity": self._identity,
            "config": self._run_config,
            "state": dict(state),
            "engine": read_counters(engine.deepspeed),
            "validation_loss": validation_loss,
        }  # fmt: skip

    def _write(self, snapshot: Snapshot) -> None:
        begin = time.perf_counter()
        try:
            path = write_checkpoint(self.directory, snapshot, self.peers, token=self._token)
        except Exception as error:  # whatever it is, training goes on: the next interval tries again
            self._error = (
                error if isinstance(error, CheckpointError) else CheckpointError(f"the save failed: {error!r}")
            )
            logger.warning("%s; training goes on, the next interval tries again", self._error)
            if self._on_failure is not None:
                self._on_failure(self._error)
            return
        logger.info("saved %s in %.1f s", path, time.perf_counter() - begin)
        if self.peers.is_first:
            self._tidy(snapshot.head["step"])

    def _tidy(self, step: int) -> None:
        self._keeper.forget(step)
        try:
            self._keeper.tidy(step)
        except OSError as error:
            logger.warning("old checkpoints in %s could not be removed: %s", self.directory, error)

    def live_weights(self, engine: Engine) -> LiveWeights:
        """Return the weights that the engine has now, as whole tensors. Collective."""
        return LiveWeights(self._bind(engine), engine.device)

    # ---- choosing

    def find_latest(self) -> Path | None:
        """Return the newest checkpoint a run can resume from, its tensors unread; None where the folder holds none.

        Raises CheckpointError where it belongs to another model, or where there are checkpoints but all are damaged.
        """
        damage: list[str] = []
        path = next(self._usable(self._list(self.directory), damage), None)
        self._give_up_if(damage and path is None, self.directory, damage)
        return path

    def resolve(self, path: Path | str) -> Path:
        """Return the checkpoint `path` or, where it is a folder of checkpoints, the newest whole one in it.

        Raises CheckpointError where there is none, or where it belongs to another model.
        """
        if self._initial is not None and Path(path) == self._initial.path:
            require_same_model(self._initial.path, self._initial.identity, self._identity)
            return self._initial.path
        damage: list[str] = []
        chosen = next(self._usable(self._list(Path(path)), damage, needs_optimizer=False), None)
        self._give_up_if(chosen is None, path, damage)
        assert chosen is not None
        return chosen

    def _list(self, directory: Path, up_to_step: int | None = None) -> list[Path]:
        """Return the checkpoints of a folder, newest first, or the path itself: what the first rank sees."""
        found = [str(path) for path in checkpoints_at(directory, up_to_step=up_to_step)]
        if not found and directory != self.directory:
            found = [str(directory)]
        return [Path(path) for path in cast(list[str], self.peers.agree(cast(JSON, found)))]

    def _usable(self, paths: Sequence[Path], damage: list[str], *, needs_optimizer: bool = True) -> Iterator[Path]:
        """Yield those of `paths` that are structurally whole and of this model; append what is wrong with others."""
        for path in paths:
            found = cast(dict[str, Any], self.peers.agree(self._judge(path) if self.peers.is_first else None))
            if found["foreign"]:
                raise CheckpointError(*found["foreign"])
            if needs_optimizer and found["other_optimizer"]:
                raise CheckpointError(found["other_optimizer"])
            damage += found["damage"]
            for finding in found["damage"]:
                self._warn("passing over a damaged checkpoint: %s", finding)
            if not found["damage"] and (found["has_optimizer"] or not needs_optimizer):
                yield path

    def _judge(self, path: Path) -> Any:
        found: dict[str, Any] = {"damage": [], "foreign": [], "other_optimizer": "", "has_optimizer": False}
        try:
            manifest = check_structure(path)
        except CheckpointError as error:
            return found | {"damage": list(error.findings)}
        try:
            require_identity(path, manifest, self._identity)
        except CheckpointError as error:
            return found | {"foreign": list(error.findings)}
        saved, wanted = _optimizer_of(manifest.config), _optimizer_of(self._run_config)
        if saved != wanted:
            found["other_optimizer"] = (
                f"{path} holds the optimizer state of {saved}, and this run has optimizer.name={wanted}; "
                f"use optimizer.name={saved}, or start from its weights alone (--load {path} --load-weights-only)"
            )
        return found | {"has_optimizer": manifest.has_optimizer}

    def _give_up_if(self, condition: object, path: Path | str, damage: Sequence[str]) -> None:
        if condition:
            reasons = damage or ["no checkpoint is there"]
            raise CheckpointError(f"no usable checkpoint in {path}: {reasons[0]}", *reasons[1:])

    def _warn(self, message: str, *values: object) -> None:
        if self.peers.is_first:
            logger.warning(message, *values)

    # ---- loading

    def load_latest(self, engine: Engine, *, up_to_step: int | None = None) -> dict[str, JSON] | None:
        """Load the newest valid checkpoint into `engine`, passing over damaged ones; return the saved train state.

        The engine may be new, or in the middle of training: either way it goes on as if it had just saved.
        `up_to_step` leaves checkpoints of later steps out of account. Returns None where the folder holds none. Raises
        CheckpointError where all are damaged (the engine's state is then undefined), or where the newest whole one
        belongs to another model.
        """
        self.wait()
        paths = self._list(self.directory, up_to_step)
        return self._load_first(engine, self.directory, paths, needs_optimizer=True, weights_only=False)

    def roll_back(self, engine: Engine, up_to_step: int) -> dict[str, JSON] | None:
        """Load the newest valid checkpoint of at most `up_to_step`, delete later ones; return the saved train state.

        Returns None, and deletes nothing, where there is none. Raises as `load_latest`.
        """
        state = self.load_latest(engine, up_to_step=up_to_step)
        if state is not None:
            step = state.get("step")
            if not isinstance(step, int):
                raise CheckpointError(f"the training state in {self.directory} gives no step; use another run folder")
            self.forget_after(step)
        return state

    def load(self, engine: Engine, path: Path | str, weights_only: bool = False) -> dict[str, JSON]:
        """Load the checkpoint `path` (or the newest valid one of that folder) and return the saved train state.

        With `weights_only` optimizer and counters stay as they are. Raises CheckpointError where nothing there fits.
        """
        self.wait()
        if self._initial is not None and Path(path) == self._initial.path:
            self._start_with(engine, self._initial)
            return {}
        paths = self._list(Path(path))
        state = self._load_first(engine, path, paths, needs_optimizer=not weights_only, weights_only=weights_only)
        self._give_up_if(state is None, path, ["it holds no optimizer state; load its weights only"])
        assert state is not None
        return state

    def start_from(self, engine: Engine, base: Base) -> None:
        """Fill all weights but the adapters from `base`, and the adapters if it has some. Collective.

        Raises CheckpointError, with what went wrong on any rank.
        """
        problems: list[str] = []
        try:
            fill_from_base(self._bind(engine), base.weights, self._identity)
        except CheckpointError as error:
            problems = list(error.findings)
        self._give_up_if(found := self._anywhere(problems), base.weights, found)
        refresh_working_weights(engine.deepspeed.optimizer)
        if base.adapters is not None:
            self.load(engine, base.adapters, weights_only=True)

    def _start_with(self, engine: Engine, weights: InitialWeights) -> None:
        problems: list[str] = []
        try:
            fill_weights(self._bind(engine), weights)
        except CheckpointError as error:
            problems = list(error.findings)
        self._give_up_if(found := self._anywhere(problems), weights.path, found)
        refresh_working_weights(engine.deepspeed.optimizer)

    def _load_first(
        self, engine: Engine, directory: Path | str, paths: Sequence[Path], *, needs_optimizer: bool, weights_only: bool
    ) -> dict[str, JSON] | None:
        damage: list[str] = []
        for path in self._usable(paths, damage, needs_optimizer=needs_optimizer):
            manifest, problems = self._read_into(engine, path, weights_only=weights_only)
            if manifest is not None and not problems:
                if not weights_only:
                    restore_counters(engine.deepspeed, manifest.engine)
                return manifest.state
            damage += problems
            for problem in problems:
                self._warn("passing over a damaged checkpoint: %s", problem)
        self._give_up_if(damage, directory, damage)
        return None

    def _read_into(self, engine: Engine, path: Path, *, weights_only: bool) -> tuple[Manifest | None, list[str]]:
        """Fill the engine; return the manifest and what went wrong on any rank."""
        binding, kinds = self._bind(engine), KINDS[:1] if weights_only else KINDS
        with ExitStack() as stack:
            wait: Callable[[Kind], None] | None = None
            manifest, problems = None, []
            try:
                reader = stack.enter_context(open_checkpoint(path))
                manifest = reader.manifest
                saved = {name: entry.shape for name, entry in manifest.parameters.items()}
                require_same_parameters(path, saved, binding.shapes)
                wait = stack.enter_context(filling(binding, reader, kinds))
                wait(KINDS[0])
            except CheckpointError as error:
                problems = list(error.findings)
            problems = self._anywhere(problems)
            if problems or wait is None:
                return manifest, problems
            refresh_working_weights(engine.deepspeed.optimizer)  # while moments are read
            try:
                for kind in kinds[1:]:
                    wait(kind)
            except CheckpointError as error:
                problems = list(error.findings)
        problems = self._anywhere(problems)
        if not problems:
            check_masters(binding.holdings)
            if not weights_only:
                restore_adam_steps(binding, cast(Manifest, manifest))
        return manifest, problems

    def _anywhere(self, problems: list[str]) -> list[str]:
        """Return the problems of all ranks. Collective."""
        everywhere = cast(list[list[str]], self.peers.exchange(cast(JSON, problems)))
        return sorted({problem for found in everywhere for problem in found})


def _optimizer_of(run_config: Mapping[str, JSON]) -> str:
    """Return the optimizer that a run's configuration names: earlier versions had one, and did not name it."""
    section = run_config.get("optimizer")
    return str(section.get("name", "adamw")) if isinstance(section, dict) else "adamw"
