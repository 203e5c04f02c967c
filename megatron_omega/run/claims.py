"""Whether a run may have its folder: one that is complete, in use, or another run's is left as it is. No torch.

A start that is refused changes nothing. One that is allowed holds the folder until it ends.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError, OmegaError
from megatron_omega.host import run_folder
from megatron_omega.host.lease import HeldError, Lease
from megatron_omega.host.regular_files import read_text
from megatron_omega.training.hooks import Hook
from megatron_omega.training.state import RunContext

_TRACES = (run_folder.METRICS, run_folder.EVENTS, f"{run_folder.CHECKPOINTS}/step-*")
"""What a run leaves that has begun."""


def notice_of_completion(config: RunConfig) -> str | None:
    """Return the sentence for a run that has nothing left to do; None if it has."""
    folder = Path(config.logging.run_directory)
    try:
        step = json.loads(read_text(folder / run_folder.SUCCESS))["step"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if not config.checkpoint.resume or not isinstance(step, int) or step < config.training.train_steps:
        return None
    if not (folder / run_folder.CHECKPOINTS / f"step-{step:08d}" / "manifest.json").exists():
        return None
    return (
        f"the run in {folder} is complete: {step} steps; to go on with it, set training.train_steps above {step}, to "
        "train anew, set another logging.run_directory"
    )


def claim(config: RunConfig) -> Lease:
    """Take the run folder for this process.

    Raises ConfigError if another start holds it, if it holds a run that is not to be gone on with, or if it cannot be
    written.
    """
    folder = Path(config.logging.run_directory)
    try:
        lease = Lease.take(folder / run_folder.LEASE)
    except HeldError as error:
        raise ConfigError(
            f"logging.run_directory={folder} is in use by another start of the run ({error}); let it go on, or end it, "
            "or set another folder"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"logging.run_directory={folder} cannot be written: {error.strerror}; choose another folder"
        ) from None
    if not config.checkpoint.resume and any(True for trace in _TRACES for _ in folder.glob(trace)):
        lease.release()
        raise ConfigError(
            f"logging.run_directory={folder} holds a run already, and checkpoint.resume=false would begin another one "
            "inside it; set another folder, move this one aside, or leave checkpoint.resume at true to go on with it"
        )
    return lease


class HoldsFolder(Hook):
    """Ends the run if another start has taken its folder over: two writers would spoil each other's files."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def on_start(self, context: RunContext) -> None:
        self._require()

    def on_phase(self, phase: str, step: int) -> None:
        self._require()

    def _require(self) -> None:
        if self._lease.lost_to is not None:
            raise OmegaError(
                f"another start of the run has taken its folder over ({self._lease.lost_to}): this one was not heard "
                "of for too long; it ends here, the other one goes on"
            )
