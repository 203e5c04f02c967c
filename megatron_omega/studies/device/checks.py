"""Every check of a device, in the order in which they are done: what others rest on comes first."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator, Sequence

import torch
from torch.backends import cpu as cpu_backend

from megatron_omega.errors import ConfigError, OmegaError
from megatron_omega.model.kernels import select_kernels
from megatron_omega.studies.device.findings import Check, Finding, LeftOut, Setting
from megatron_omega.studies.device.numerics import check_branches, check_functions
from megatron_omega.studies.device.ranks import check_faults, check_groups, check_layouts
from megatron_omega.studies.device.speed import check_layers, check_memory, check_steps
from megatron_omega.studies.device.training import check_losses, check_placement, check_resume, check_waits

LEAST_CAPABILITY = 8.0
"""Of a GPU that computes in bf16: Ampere."""


def check_device(setting: Setting) -> Iterator[Finding]:
    """Say what device this is, and whether this torch has code for it."""
    kernels = "; ".join(select_kernels(setting.device).choices)
    yield Finding("device", f"kernels: {kernels}", 0)
    if not setting.on_gpu:
        words = f"{platform.machine()}, {cpu_backend.get_cpu_capability()}, torch {torch.__version__}"
        yield Finding("device", words, torch.get_num_threads(), None, "threads")
        return
    major, minor = torch.cuda.get_device_capability()
    words = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, {_nccl()}"
    yield Finding("device", f"{words}: capability", major + minor / 10, LEAST_CAPABILITY, is_floor=True)
    built = [int(name.partition("_")[2].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    yield Finding("device", "GPUs", torch.cuda.device_count(), setting.gpus, is_floor=True)
    usable = sum(code // 10 == major and code % 10 <= minor for code in built)
    yield Finding("device", f"architectures among {built} that run on it", usable, 1, is_floor=True)


def _nccl() -> str:
    if not torch.distributed.is_nccl_available():
        return "no NCCL"
    nccl = importlib.import_module("torch.cuda.nccl")
    return f"NCCL {'.'.join(map(str, nccl.version()))}"


CHECKS: dict[str, Check] = {
    "device": check_device,
    "placement": check_placement,
    "branches": check_branches,
    "functions": check_functions,
    "waits": check_waits,
    "losses": check_losses,
    "resume": check_resume,
    "layers": check_layers,
    "memory": check_memory,
    "groups": check_groups,
    "layouts": check_layouts,
    "faults": check_faults,
    "steps": check_steps,
}


def every_finding(setting: Setting, names: Sequence[str] = ()) -> Iterator[Finding | LeftOut]:
    """Yield what every check, or those of `names`, finds. Raises ConfigError for one that does not exist."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ConfigError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    for name in names or CHECKS:
        yield from _without_end(name, setting)


def _without_end(name: str, setting: Setting) -> Iterator[Finding | LeftOut]:
    """Yield what a check finds; that it broke off is a finding, too."""
    try:
        yield from CHECKS[name](setting)
    except OmegaError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        yield Finding(name, "ended by an error", 1, 0, detail=f"{type(error).__name__}: {lines[-1].strip()}")
