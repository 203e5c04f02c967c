"""Before there is an engine: join and leave the process group, ask what the accelerator can do, build a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megatron_omega.engine.repairs import handing_over_groups, skip_inference_extension
from megatron_omega.errors import ConfigError
from megatron_omega.host.allocator import keep_freed_memory
from megatron_omega.parallel.mpu import ModelParallelUnit
from megatron_omega.parallel.topology import Topology


def accelerator() -> Any:  # DeepSpeed declares that it may be None; it never is
    return get_accelerator()


def start_distributed(*, local_rank: int, timeout_seconds: float) -> str:
    """Join the process group that the launcher prepared; return the device type ("cpu", "cuda")."""
    skip_inference_extension()
    device = accelerator()
    if device.device_name() == "cpu":
        keep_freed_memory()
    else:
        device.set_device(local_rank)
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout_seconds))
    return device.device_name()


def visible_devices() -> tuple[str, int]:
    """Return the type of the accelerator and how many of them this process sees."""
    return accelerator().device_name(), accelerator().device_count()


def stop_distributed() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_precision(dtype: str) -> None:
    """Raise `ConfigError` if the accelerator cannot run `dtype`."""
    device = accelerator()
    if dtype == "fp16" and not device.is_fp16_supported():
        raise ConfigError(
            f"precision.dtype=fp16 cannot run on {device.device_name()}: DeepSpeed has no fp16 there; "
            "use fp32 or bf16, or a GPU"
        )


@contextmanager
def construction(values: Mapping[str, Any], topology: Topology) -> Iterator[None]:
    """Surround the building of the model: under ZeRO-3 each layer is partitioned as soon as it exists."""
    with ExitStack() as stack:
        stack.enter_context(handing_over_groups(topology))
        if values["zero_optimization"]["stage"] == 3:
            mpu, group = ModelParallelUnit(topology), topology.data.handle
            init = deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=dict(values), mpu=mpu)
            stack.enter_context(init)
        yield
