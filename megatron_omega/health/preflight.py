"""What must hold before the first collective: devices, disk, corpus, meeting point, and that all ranks run the same.

Every check returns findings; the guard gathers those of all ranks in one list.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_omega import accounting
from megatron_omega.config.layout import Layout
from megatron_omega.config.load import ResolvedRun
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError, OmegaError
from megatron_omega.host.open_files import allow_many_files, files_needed

STATE_BYTES_PER_PARAMETER = 12
"""A checkpoint holds the fp32 weight and both Adam moments."""
_PACKAGE = Path(__file__).parents[1]
_VERSIONED = ("torch", "deepspeed", "numpy")


def fingerprint(resolved: ResolvedRun, *, has_code: bool = True) -> dict[str, str]:
    """Return what must be the same on all ranks, each as a short text; the code too, which one rank of a host reads."""
    code = {"code": _digest(*(path.read_bytes() for path in sorted(_PACKAGE.rglob("*.py"))))} if has_code else {}
    return {
        "configuration": _digest(repr((resolved.config.model_dump(mode="json"), resolved.deepspeed.values)).encode()),
        **code,
        **{f"version of {name}": _version(name) for name in _VERSIONED},
    }


def gather_findings(checks: Mapping[str, Callable[[], Any]]) -> tuple[list[str], int]:
    """Run all checks; return their findings and the exit code that fits (a configuration error goes before others).

    A check returns findings, or raises OmegaError with some.
    """
    findings: list[str] = []
    codes: list[int] = []
    for check in checks.values():
        try:
            found, code = check() or [], ConfigError.exit_code
        except OmegaError as error:
            found, code = error.findings, error.exit_code
        findings += found
        codes += [code] * bool(found)
    code = ConfigError.exit_code if ConfigError.exit_code in codes else next(iter(codes), ConfigError.exit_code)
    return findings, code


def disk_findings(config: RunConfig) -> list[str]:
    """Return a finding where the run's folder has no room for one more checkpoint."""
    directory = Path(config.logging.run_directory)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    size = accounting.parameter_count(config.model) * STATE_BYTES_PER_PARAMETER
    free = shutil.disk_usage(existing).free
    if free >= size:
        return []
    return [
        f"logging.run_directory={directory}: {free / 1e9:.1f} GB are free there, and a checkpoint takes "
        f"{size / 1e9:.1f} GB; free some, or choose another folder"
    ]


def device_findings(local_rank: int, *, device_type: str, device_count: int) -> list[str]:
    """Return a finding where this host has fewer accelerators than ranks."""
    if device_type == "cpu" or local_rank < device_count:
        return []
    return [
        f"rank {local_rank} of this host has no device: {device_count} {device_type} devices are visible; start fewer"
    ]


def open_files_findings(rank: int, layout: Layout, device_type: str) -> list[str]:
    """Return a finding where this process may not open as many files and connections as the run needs."""
    sizes = (layout.world_size, layout.tensor, layout.data, layout.pipeline, layout.tensor * layout.pipeline)
    needed = files_needed(rank, layout.world_size, sum(sizes) if device_type == "cpu" and layout.world_size > 1 else 0)
    allowed = allow_many_files()
    if allowed >= needed:
        return []
    return [
        f"rank {rank} may open {allowed:,} files and connections, and a run of {layout.world_size:,} ranks needs "
        f"{needed:,} there; raise the hard limit (ulimit -Hn; LimitNOFILE= of slurmd; --ulimit nofile= of a container)"
    ]


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
