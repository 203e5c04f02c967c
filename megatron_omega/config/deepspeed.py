"""What DeepSpeed is told. Two sources, one owner for each key: the JSON owns ZeRO, offload, profiling and
communication, the run's configuration everything else. A key of ours in the JSON must agree with us (or say "auto").

Emits plain data; does not import DeepSpeed. Key names are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host.regular_files import read_text
from megatron_omega.host.shipped import deepspeed_settings, located

AUTO = "auto"
NEVER_STEPS = 10**12
"""steps_per_print: metrics are ours, so DeepSpeed's own line is put off for ever."""

IN_PLACE_ELEMENTS = 1 << 18
"""Larger gradients are summed where they lie on a CPU (ZeRO-1, fp32): a message costs less than a copy there."""

DEFAULT_SETTINGS: Mapping[str, Any] = {"zero_optimization": {"stage": 1}}

JSON_OWNED = (
    "zero_optimization", "flops_profiler", "comms_logger", "wall_clock_breakdown", "memory_breakdown", "dump_state",
    "log_level", "disable_python_gc", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "disable_allgather", "aio", "compile", "autotuning",
)  # fmt: skip
"""Top-level keys the JSON may set freely."""

REFUSED: Mapping[str, str] = {
    "activation_checkpointing": "parallel.recompute decides what is computed again",
    "checkpoint": "checkpoints are written by this package (checkpoint.*)",
    "tensorboard": "use logging.tensorboard",
    "wandb": "use logging.wandb",
    "csv_monitor": "metrics.jsonl has every step",
    "comet": "it is not supported",
    "monitor_config": "use logging.*",
    "torch_autocast": "precision.dtype decides the number format",
    "bfloat16": "precision.dtype decides the number format",
    "amp": "precision.dtype decides the number format",
    "tensor_parallel": "use parallel.tensor_parallel_size",
    "sequence_parallel_size": "use parallel.sequence_parallel",
    "seq_parallel_communication_data_type": "sequence parallelism here is not DeepSpeed's",
    "expert_parallel": "this model has no experts",
    "use_data_before_expert_parallelism": "this model has no experts",
    "hybrid_engine": "it is for inference",
    "data_efficiency": "data.* and objective.* decide the data",
    "dataloader_drop_last": "data.* decides the data",
    "managed_gradient_accumulation": "batch.* decides accumulation",
    "elasticity": "DeepSpeed 0.19 removed it; a checkpoint resumes under any layout",
    "curriculum_learning": "DeepSpeed 0.19 removed it",
    "progressive_layer_drop": "DeepSpeed 0.19 removed it",
    "compression_training": "DeepSpeed 0.19 removed it",
    "quantize_training": "DeepSpeed 0.19 removed it",
    "sparse_attention": "DeepSpeed 0.19 removed it",
    "sparse_gradients": "DeepSpeed 0.19 removed it",
    "graph_harvesting": "DeepSpeed 0.19 removed it",
    "eigenvalue": "DeepSpeed 0.19 removed it",
    "nebula": "DeepSpeed 0.19 removed it",
}
"""Top-level keys of DeepSpeed that a run cannot use, and why."""

ZERO_KEYS = (
    "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
    "allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "elastic_checkpoint",
    "offload_param", "offload_optimizer", "zenflow", "sub_group_size", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
    "round_robin_gradients", "parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights",
    "zero_quantized_nontrainable_weights", "zero_quantized_gradients", "memory_efficient_linear",
    "pipeline_loading_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory", "leaf_module", "legacy_stage1", "load_from_fp32_weights",
    "stage3_gather_fp16_weights_on_model_save",
)  # fmt: skip


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What `deepspeed.initialize(config=...)` receives."""

    values: dict[str, Any]
    """The whole configuration; nothing in it says "auto"."""
    zero_stage: int
    """The stage that runs."""
    notices: tuple[str, ...]
    """Settings that were mapped to others."""


def read_deepspeed_json(path: Path | str | None) -> dict[str, Any]:
    """Return what a DeepSpeed JSON file holds; ZeRO-1 if there is no file.

    Raises:
        ConfigError: the file cannot be read, is not JSON, gives a key twice, or is not an object.
    """
    if path is None:
        return dict(DEFAULT_SETTINGS)
    try:
        file = located(path, deepspeed_settings())
        values = json.loads(read_text(file), object_pairs_hook=_each_key_once)
    except OSError as error:
        known = ", ".join(deepspeed_settings())
        raise ConfigError(
            f"--deepspeed_config {path} cannot be read: {error.strerror}; give the path of a JSON file, or a name that "
            f"comes with the package: {known}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed_config {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed_config {path} must hold an object, as ds_configs/zero1.json does")
    return values


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return values


def effective_zero_stage(config: RunConfig, user_json: Mapping[str, Any]) -> int:
    """Return the ZeRO stage that will run.

    Stage 0 with 16-bit weights runs as stage 1: the optimizer wrapper DeepSpeed takes there steps once while it is
    constructed. The result is the same weights, with the optimizer's state sharded.
    """
    zero = user_json.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else 0
    if stage == AUTO:
        return 1
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        return 1  # `resolve_deepspeed` refuses it
    return 1 if stage == 0 and config.precision.dtype != "fp32" else int(stage)


def resolve_deepspeed(config: RunConfig, user_json: Mapping[str, Any], data_parallel_size: int) -> DeepSpeedSettings:
    """Join what the JSON owns with what the run's configuration owns.

    Args:
        user_json: the content of a `ds_configs/*.json`.
        data_parallel_size: replicas of the model.

    Raises:
        ConfigError: with every key that is unknown, cannot be used here, or contradicts the run's configuration.
    """
    owned = _owned(config, data_parallel_size)
    found = [*_findings(user_json, owned)]
    if found:
        raise ConfigError(*found)
    stage = effective_zero_stage(config, user_json)
    values = {name: _without_auto(value) for name, value in user_json.items() if name in JSON_OWNED and value != AUTO}
    zero = values.setdefault("zero_optimization", {})
    asked = user_json.get("zero_optimization", {}).get("stage", 0)
    notices = []
    if asked not in (stage, AUTO):
        notices.append(
            f"zero_optimization.stage={asked} with precision.dtype={config.precision.dtype} runs as stage {stage}"
        )
    zero["stage"] = stage
    values |= _emitted(config, owned, stage)
    return DeepSpeedSettings(values, stage, tuple(notices))


def _owned(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """Return our value of every DeepSpeed key that we own, also of those that are not emitted."""
    batch, precision, optimizer = config.batch, config.precision, config.optimizer
    accumulation = batch.global_batch_size // (batch.micro_batch_size * data_parallel_size)
    return {
        "train_batch_size": batch.global_batch_size,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "steps_per_print": NEVER_STEPS,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "pipeline": {
            "pipe_partitioned": False,  # two gradient-carrying tensors fail under tensor parallelism otherwise
            "grad_partitioned": False,
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,  # recomputation is the layers' own
        },
        "bf16": {
            "enabled": precision.dtype == "bf16",
            # The optimizer takes a gradient when it is there, instead of all after every backward pass.
            "immediate_grad_update": precision.dtype == "bf16",
        },
        "fp16": {
            "enabled": precision.dtype == "fp16",
            "loss_scale": 0,  # dynamic
            "initial_scale_power": precision.initial_loss_scale_power,
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": 2,
            "min_loss_scale": precision.min_loss_scale,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.learning_rate,
                "betas": [optimizer.beta1, optimizer.beta2],
                "eps": optimizer.epsilon,
                "weight_decay": optimizer.weight_decay,
            },
        },
        "scheduler": {},
    }


_OWNERS: Mapping[str, str] = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size / (batch.micro_batch_size x data-parallel size)",
    "gradient_clipping": "optimizer.gradient_clipping",
    "bf16": "precision.dtype",
    "fp16": "precision.*",
    "data_types": "precision.dtype",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "pipeline": "parallel.*",
}


def _emitted(config: RunConfig, owned: Mapping[str, Any], zero_stage: int) -> dict[str, Any]:
    """Return the owned keys DeepSpeed gets: optimizer and scheduler are ours, unused formats left out."""
    dtype = config.precision.dtype
    unused = {"optimizer", "scheduler", *({"bf16", "fp16"} - {dtype})}
    if dtype != "bf16":
        unused.add("data_types")
    emitted = {name: value for name, value in owned.items() if name not in unused}
    if zero_stage == 0:
        emitted["gradient_clipping"] = 0.0  # DeepSpeed has no true global norm at stage 0: our optimizer clips there
    return emitted


def _findings(user_json: Mapping[str, Any], owned: Mapping[str, Any]) -> Iterator[str]:
    for name, value in user_json.items():
        if name in owned:
            yield from _contradictions(name, name, value, owned[name])
        elif name in REFUSED:
            yield f"{name} in the DeepSpeed configuration cannot be used: {REFUSED[name]}; remove it"
        elif name not in JSON_OWNED:
            yield _unknown(name, name, [*JSON_OWNED, *owned])
    zero = user_json.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        shown = json.dumps(zero)
        yield f'zero_optimization={shown} in the DeepSpeed configuration must be an object such as {{"stage": 1}}'
        return
    for name in zero:
        if name not in ZERO_KEYS:
            yield _unknown(f"zero_optimization.{name}", name, ZERO_KEYS)
    stage = zero.get("stage", 0)
    if stage != AUTO and (stage not in (0, 1, 2, 3) or isinstance(stage, bool)):
        yield f"zero_optimization.stage={json.dumps(stage)} in the DeepSpeed configuration; use 0, 1, 2 or 3"


def _unknown(place: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "remove it"
    return f"{place} in the DeepSpeed configuration is no setting of DeepSpeed 0.19; {hint}"


def _contradictions(top: str, place: str, theirs: Any, ours: Any) -> Iterator[str]:
    """Yield one finding for each leaf of `theirs` that differs from ours; "auto" agrees with everything."""
    if theirs == AUTO:
        return
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping | None):
        for name, value in theirs.items():
            yield from _contradictions(top, f"{place}.{name}", value, (ours or {}).get(name))
    elif isinstance(theirs, list) and isinstance(ours, list) and AUTO in theirs:
        return
    elif theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):
        owner = f"it follows from {_OWNERS[top]}" if top in _OWNERS else "it is fixed by this package"
        value = f"is {json.dumps(ours)} here" if ours is not None else "is not set here"
        yield (
            f"{place}={json.dumps(theirs)} in the DeepSpeed configuration, but it {value} ({owner}); "
            "remove it from the JSON"
        )


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_auto(inner) for name, inner in value.items() if inner != AUTO}
    return value
