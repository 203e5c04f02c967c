"""Compiled layers in a run: the cache its ranks share, and a word when something is compiled that should not be.

Every host has a folder of compiled code in the run folder, so that the next start finds it; what a start that did not
end well left there is thrown away, since a file may be half there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, MutableMapping
from os import environ as process_environment
from pathlib import Path

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host import run_folder
from megatron_omega.host.environment import ProcessPlace, host_name
from megatron_omega.host.private import code_folder, refuse_foreign
from megatron_omega.log import get_logger
from megatron_omega.model.compilation import Compilations
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import EvaluationReport, RunContext, StepReport

log = get_logger(__name__)

_WARM_UP_STEPS = 2
_IN_USE = "in-use"
_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def compilation_hooks(config: RunConfig) -> list[Hook]:
    """Return what a run with compiled layers needs beside them; nothing for a run without."""
    if config.training.compile == "off":
        return []
    if config.parallel.recompute == "swiglu":
        log.warning(
            "parallel.recompute: swiglu does little beside training.compile: layers, which keeps about as little by "
            "itself; use none"
        )
    return [CompiledLayers(_cache(Path(config.logging.run_directory)))]


def _cache(run_directory: Path) -> Path:
    return run_directory / run_folder.COMPILED / host_name()


def share_cache(
    run_directory: Path, place: ProcessPlace, environ: MutableMapping[str, str] = process_environment
) -> Path:
    """Let this host's ranks compile into one folder of the run, unless the environment names another; return it.

    The first rank of a host empties it if the start before did not end well. What stands there will be run: raises
    ConfigError if others could have put it there.
    """
    folder = _cache(run_directory)
    _refuse_foreign(folder, environ)
    if place.local_rank == 0:
        if (folder / _IN_USE).exists():
            log.warning("the start before ended while %s was in use: compiled layers are compiled again", folder)
            shutil.rmtree(folder)
        code_folder(folder)
        (folder / _IN_USE).touch()
    for variable, name in _CACHES.items():
        environ.setdefault(variable, str(folder / name))
    return folder


def _refuse_foreign(folder: Path, environ: Mapping[str, str]) -> None:
    """Raise ConfigError if code that this run may load is not this user's alone."""
    named = [Path(environ[variable]) for variable in (*_CACHES, "TORCH_EXTENSIONS_DIR") if environ.get(variable)]
    for place in (folder.parent, folder, *(folder / name for name in _CACHES.values()), *named):
        try:
            refuse_foreign(place, is_folder=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(
                f"{place}, where compiled code is kept and run from, {error.strerror}; remove it, or name another "
                f"folder by {next(iter(_CACHES))}"
            ) from None


class CompiledLayers(Hook):
    """Warns of a layer compiled after the first steps and the first validation; releases the cache at a good end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._compilations = Compilations()
        self._first_step: int | None = None
        self._has_validated = False
        self._has_failed = False

    def on_start(self, context: RunContext) -> None:
        self._compilations.new()

    def on_step_end(self, report: StepReport) -> None:
        self._first_step = report.step if self._first_step is None else self._first_step
        self._judge(report.step, is_expected=report.step < self._first_step + _WARM_UP_STEPS)

    def on_evaluate(self, report: EvaluationReport) -> None:
        self._judge(report.step, is_expected=not self._has_validated)
        self._has_validated = True

    def on_error(self, error: BaseException) -> None:
        self._has_failed = True

    def on_close(self) -> None:
        if not self._has_failed:
            (self._folder / _IN_USE).unlink(missing_ok=True)

    def _judge(self, step: int, *, is_expected: bool) -> None:
        for cause in self._compilations.new():
            if not is_expected:
                log.warning("step %d: a layer was compiled again, which takes time: %s", step, cause)
