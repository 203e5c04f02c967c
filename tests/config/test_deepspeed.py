"""Who owns which key, and what DeepSpeed is told in the end."""

from __future__ import annotations

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_omega.config import deepspeed
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def configuration(dtype: str = "bf16", **batch: int) -> RunConfig:
    return RunConfig.model_validate({"precision": {"dtype": dtype}, "batch": {"global_batch_size": 16, **batch}})


def findings_of(user_json: dict[str, Any], config: RunConfig | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        deepspeed.resolve_deepspeed(config or configuration(), user_json, data_parallel_size=2)
    return list(caught.value.findings)


def test_emitted_whole() -> None:
    values = deepspeed.resolve_deepspeed(
        configuration(micro_batch_size=2), {"zero_optimization": {"stage": 2}}, 4
    ).values
    assert values == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": deepspeed.NEVER_STEPS,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "pipeline": {
            "pipe_partitioned": False,
            "grad_partitioned": False,
            "use_reentrant": False,
            "activation_checkpoint_interval": 0,
        },
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "timers": {"throughput": {"enabled": False}},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def test_fp32_has_no_format_and_stage_0_leaves_clipping_to_our_optimizer() -> None:
    resolved = deepspeed.resolve_deepspeed(configuration("fp32"), {"zero_optimization": {"stage": 0}}, 1)
    assert not {"bf16", "fp16", "data_types"} & {*resolved.values}
    assert resolved.values["gradient_clipping"] == 0
    assert (resolved.zero_stage, resolved.notices) == (0, ())


def test_fp16_scaling() -> None:
    values = deepspeed.resolve_deepspeed(configuration("fp16"), {"zero_optimization": {"stage": 1}}, 1).values
    assert values["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1.0,
    }
    assert "bf16" not in values and "data_types" not in values


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("user_json", [{}, {"zero_optimization": {"stage": 0}}])
def test_sixteen_bits_at_stage_0_run_as_stage_1_and_say_so(dtype: str, user_json: dict[str, Any]) -> None:
    resolved = deepspeed.resolve_deepspeed(configuration(dtype), user_json, 1)
    assert resolved.zero_stage == resolved.values["zero_optimization"]["stage"] == 1
    assert resolved.values["gradient_clipping"] == 1.0
    (notice,) = resolved.notices
    assert "runs as stage 1" in notice


@pytest.mark.parametrize(
    ("user_json", "expected"),
    [
        ({"train_batch_size": 512}, "train_batch_size=512 in the DeepSpeed configuration, but it is 16 here (it follows from batch.global_batch_size)"),
        ({"gradient_clipping": 0.3}, "gradient_clipping=0.3 in the DeepSpeed configuration, but it is 1.0 here"),
        ({"gradient_accumulation_steps": 3}, "but it is 8 here"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true in the DeepSpeed configuration, but it is false here"),
        ({"fp16": True}, "fp16=true"),
        ({"bf16": {"immediate_grad_update": False}}, "bf16.immediate_grad_update=false in the DeepSpeed configuration, but it is true here"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, 'data_types.grad_accum_dtype="bf16"'),
        ({"optimizer": {"type": "Adam"}}, 'optimizer.type="Adam"'),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr=1 in the DeepSpeed configuration, but it is 0.003 here"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule.*"),
        ({"pipeline": {"activation_checkpoint_interval": 1}}, "pipeline.activation_checkpoint_interval=1"),
        ({"zero_force_ds_cpu_optimizer": True}, "it is false here (it is fixed by this package)"),
        ({"steps_per_print": 10}, "steps_per_print=10"),
        ({"activation_checkpointing": {}}, "parallel.recompute"),
        ({"elasticity": {"enabled": True}}, "removed it"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean zero_optimization?"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "did you mean reduce_bucket_size?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage=true"),
        ({"zero_optimization": 1}, "must be an object"),
    ],
)  # fmt: skip
def test_a_key_out_of_place_is_found(user_json: dict[str, Any], expected: str) -> None:
    (finding,) = findings_of(user_json)
    assert expected in finding


def test_all_findings_at_once() -> None:
    assert len(findings_of({"train_batch_size": 1, "nonsense": 1, "zero_optimization": {"stage": 9}})) == 3


def test_agreement_and_auto_are_accepted() -> None:
    user_json = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": ["auto", "auto"], "eps": 1e-8}},
        "scheduler": {"type": "auto", "params": {"warmup_min_lr": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "cpu", "buffer_count": "auto"}},
        "communication_data_type": "auto",
        "wall_clock_breakdown": True,
    }  # fmt: skip
    values = deepspeed.resolve_deepspeed(configuration(), user_json, 2).values
    assert values["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}
    assert values["wall_clock_breakdown"] is True
    assert "auto" not in json.dumps(values)
    assert not {"optimizer", "scheduler", "communication_data_type"} & {*values}


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_files_of_this_repository(path: Path) -> None:
    resolved = deepspeed.resolve_deepspeed(configuration("fp32"), deepspeed.read_deepspeed_json(path), 1)
    assert path.stem.startswith(f"zero{resolved.zero_stage}")
    assert ("offload_optimizer" in resolved.values["zero_optimization"]) == path.stem.endswith("offload")


def test_the_default_is_zero1() -> None:
    assert deepspeed.read_deepspeed_json(None) == deepspeed.read_deepspeed_json(DS_CONFIGS / "zero1.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is not JSON"), ("[]", "must hold an object"), ('{"a": 1, "a": 2}', "'a' is given twice")],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        deepspeed.read_deepspeed_json(path)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        deepspeed.read_deepspeed_json("no/such.json")


def installed_source(name: str) -> str:
    """Return the text of a file of the installed DeepSpeed, without importing it."""
    spec = find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / name).read_text()


def test_the_zero_keys_are_those_of_the_installed_deepspeed() -> None:
    tree = ast.parse(installed_source("runtime/zero/config.py"))
    (model,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DeepSpeedZeroConfig"]
    names = set()
    for node in model.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            keywords = node.value.keywords if isinstance(node.value, ast.Call) else []
            alias = [
                word.value.value for word in keywords if word.arg == "alias" and isinstance(word.value, ast.Constant)
            ]
            names.add(alias[0] if alias else node.target.id)
    assert names == {*deepspeed.ZERO_KEYS}


def test_the_top_level_keys_are_known_to_the_installed_deepspeed() -> None:
    places = (
        "runtime/constants.py",
        "runtime/config.py",
        "runtime/engine.py",
        "profiling/constants.py",
        "comm/constants.py",
    )
    places += ("comm/config.py", "runtime/swap_tensor/constants.py", "runtime/activation_checkpointing/config.py")
    places += (
        "monitor/config.py",
        "autotuning/constants.py",
        "compile/config.py",
        "runtime/data_pipeline/constants.py",
    )
    text = "\n".join(installed_source(place) for place in places)
    unknown = [key for key in deepspeed.JSON_OWNED if f'"{key}"' not in text and f"'{key}'" not in text]
    assert unknown == []
