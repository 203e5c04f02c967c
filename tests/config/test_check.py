"""Each contradiction is found, and named with what would mend it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_omega.config import check
from megatron_omega.config.schema import RunConfig

READY: dict[str, Any] = {"data": {"tokenizer": "t.model", "corpora": [{"prefix": "corpus"}]}}


def configuration(**changes: Any) -> RunConfig:
    """Build a runnable configuration, changed at `section__field`."""
    values: dict[str, Any] = {name: dict(section) for name, section in READY.items()}
    for name, value in changes.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return RunConfig.model_validate(values)


def test_the_defaults_have_no_findings() -> None:
    assert check.findings(configuration(), world_size=8, zero_stage=1) == []
    assert check.notices(configuration()) == []


CASES: list[tuple[dict[str, Any], str]] = [
    ({"parallel__tensor_parallel_size": 5}, "model.num_attention_heads=48 is not divisible by parallel.tensor_parallel_size=5; use 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48"),
    ({"parallel__tensor_parallel_size": 3}, "model.ffn_hidden_size=16384 is not divisible by parallel.tensor_parallel_size=3; use 1, 2, 4, 8 or 16"),
    ({"model__head_dim": 15}, "model.head_dim=15 is odd"),
    ({"model__hidden_size": 144}, "model.head_dim=3 (model.hidden_size / model.num_attention_heads) is odd"),
    ({"model__hidden_size": 100}, "model.hidden_size=100 is not divisible by model.num_attention_heads=48"),
    ({"model__hidden_size": 961, "model__head_dim": 20, "model__positions": "sinusoidal"}, "model.hidden_size=961 is odd"),
    ({"model__local_window": 16}, "model.local_window=16 is smaller than model.axial_width=32 (in model.encoder_branches)"),
    ({"model__encoder_branches": ["causal"]}, "has causal, which no encoder can use; use full, local, axial or dynamic"),
    ({"model__decoder_branches": ["causal", "dynamic"]}, "has dynamic, which no decoder can use"),
    ({"model__decoder_branches": []}, "model.decoder_branches is empty"),
    ({"model__encoder_branches": ["full", "full"]}, "names full more than once"),
    ({"model__encoder_branches": [["full"], []]}, "model.encoder_branches[1] is empty; name at least one of full"),
    ({"model__decoder_branches": [["causal"], ["local", "full"]]}, "model.decoder_branches[1]=[local, full] has full, which no decoder can use"),
    ({"model__encoder_branches": [["full", "local"], ["axial"]], "model__local_window": 16, "model__decoder_branches": ["causal"]}, "model.local_window=16 is smaller than model.axial_width=32 (in model.encoder_branches)"),
    ({"data__encoder_seq_length": 100}, "data.encoder_seq_length=100 is not a multiple of model.axial_width=32 (the axial branch works on whole rows); use 96 or 128"),
    ({"data__decoder_seq_length": 33}, "use 32 or 64"),
    ({"data__encoder_seq_length": 0}, "data.encoder_seq_length=0 with model.encoder_layers=96"),
    ({"model__encoder_layers": 0}, "data.encoder_seq_length=2048 with model.encoder_layers=0"),
    ({"objective__prefix_lm": 0, "objective__span_corruption": 0, "objective__masked_prefix": 0}, "leave nothing to train"),
    ({"training__profile_steps": [3, 2]}, "training.profile_steps=[3, 2] must be a first and a last step within training.train_steps=1000"),
    ({"objective__span_corruption": 0.1, "objective__span_rate": 0}, "objective.span_rate=0 is not between 0 and 1"),
    ({"objective__span_corruption": 0.1, "objective__span_mean_length": 0.5}, "objective.span_mean_length=0.5 is less than a token"),
    ({"objective__mask_rate": 0}, "objective.mask_rate=0 masks nothing"),
    ({"parallel__sequence_parallel": True}, "parallel.sequence_parallel=true with parallel.tensor_parallel_size=1"),
    ({"parallel__pipeline_schedule": "dualpipev"}, "use 1f1b, or at least 2 pipeline stages"),
    ({"parallel__pipeline_parallel_size": 2, "parallel__pipeline_schedule": "interleaved"}, "use interleaved with at least 2 virtual stages"),
    ({"parallel__pipeline_parallel_size": 2, "parallel__virtual_stages": 2}, "or another schedule with 1"),
    ({"parallel__pipeline_parallel_size": 4, "parallel__virtual_stages": 99, "parallel__pipeline_schedule": "interleaved"}, "x parallel.virtual_stages=99 cuts"),
    ({"parallel__pipeline_parallel_size": 4, "parallel__pipeline_schedule": "dualpipev", "batch__global_batch_size": 7}, "makes 7 micro-batches for each replica, and parallel.pipeline_schedule=dualpipev needs at least 8"),
    ({"model__encoder_layers": 1, "model__decoder_layers": 1, "parallel__pipeline_parallel_size": 6}, "use at most 5"),
    ({"parallel__pipeline_parallel_size": 2, "parallel__stage_boundaries": [3, 9]}, "has 2 entries for 2 stages"),
    ({"parallel__pipeline_parallel_size": 3, "parallel__stage_boundaries": [9, 9]}, "is not ascending"),
    ({"parallel__pipeline_parallel_size": 2, "parallel__stage_boundaries": [195]}, "has 195 outside 1 to 194"),
    ({"batch__global_batch_size": 10, "batch__micro_batch_size": 4}, "batch.global_batch_size=10 is not divisible by batch.micro_batch_size=4 x 1 data-parallel replicas; use 8 or 12"),
    ({"batch__ramp_up": {"start": 8, "increment": 1, "samples": 9}}, "batch.ramp_up.start=8 is not below"),
    ({"batch__global_batch_size": 16, "batch__ramp_up": {"start": 4, "increment": 5, "samples": 9}}, "does not lead from 4 to batch.global_batch_size=16; use 4 or 6"),
    ({"batch__global_batch_size": 12, "batch__micro_batch_size": 4, "batch__ramp_up": {"start": 6, "increment": 6, "samples": 9}}, "batch.ramp_up: the global batch size=6 is not divisible"),
    ({"schedule__warmup_steps": 1001}, "schedule.warmup_steps=1001 is more than training.train_steps=1000"),
    ({"schedule__decay": "wsd", "schedule__warmup_steps": 900}, "overlap within training.train_steps=1000; use a fraction of at most 0.1"),
    ({"data__encoder_seq_length": 64, "data__decoder_seq_length": 64}, "model.local_window=128 reaches beyond the 64 tokens of a text (data.encoder_seq_length, data.decoder_seq_length); use at most 64"),
    ({"model__decoder_branches": ["select"], "model__select_blocks": 64}, "model.select_blocks=64 with model.axial_width=32 leaves nothing out of data.decoder_seq_length=2048; use at most 63"),
    ({"objective__span_corruption": 0.1, "objective__span_mean_length": 4096}, "objective.span_mean_length=4096 is longer than a text of 2048 tokens"),
    ({"objective__mask_span_length": 4096}, "objective.mask_span_length=4096 is longer than data.encoder_seq_length=2048"),
    ({"lora__also": ("table",)}, "lora.also=[table] without adapters; say their rank (--lora.rank 8)"),
    ({"lora__rank": 8, "lora__targets": ()}, "lora.targets is empty; name at least one of qkv, out, gate_up, down or cross"),
    ({"lora__rank": 8, "lora__targets": ("qkv", "qkv")}, "lora.targets=[qkv, qkv] names something more than once; name each once"),
    ({"lora__rank": 8, "lora__also": ("table", "table")}, "lora.also=[table, table] names something more than once; name each once"),
    ({"lora__rank": 8}, "lora.rank=8 without checkpoint.load; adapters stand beside trained weights: say which (--load PATH)"),
    ({"lora__rank": 8, "optimizer__name": "muon"}, "lora.rank=8 with optimizer.name=muon, which moves whole matrices; use adamw"),
    ({"lora__rank": 8, "lora__targets": ("cross",), "model__encoder_layers": 0, "data__encoder_seq_length": 0}, "lora.targets=[cross] with model.encoder_layers=0"),
    ({"precision__dtype": "fp16", "precision__min_loss_scale": 3e6}, "precision.min_loss_scale=3e+06 is above the first loss scale"),
    ({"optimizer__beta2": 1.0}, "optimizer.beta2=1 never forgets"),
    ({"checkpoint__load_weights_only": True}, "without checkpoint.load"),
    ({"data__corpora": []}, "data.corpora is empty"),
    ({"data__tokenizer": ""}, "data.tokenizer is not set"),
    ({"data__reweight": [{"from_sample": 5, "weights": [1, 2]}]}, "data.reweight from sample 5 has 2 weights for 1 corpora"),
    ({"data__reweight": [{"from_sample": 5, "weights": [0]}]}, "has a weight from sample 5 on"),
    ({"data__reweight": [{"from_sample": 5, "weights": [1]}] * 2}, "not ascending in from_sample"),
    ({"data__split": [0, 1, 0]}, "has no train part"),
    ({"data__split": [1, 0, 0]}, "has no validation part"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), CASES)
def test_a_contradiction_is_named(changes: dict[str, Any], expected: str) -> None:
    config = configuration(**changes)
    ranks = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    found = check.findings(config, world_size=ranks, zero_stage=1)
    assert any(expected in finding for finding in found), found


@pytest.mark.parametrize(
    ("world_size", "zero_stage", "expected"),
    [
        (6, 1, "6 processes are not divisible by parallel.tensor_parallel_size=2 x parallel.pipeline_parallel_size=2; start 4 or 8"),
        (2, 1, "start 4"),
        (12, 1, "batch.global_batch_size=8 is not divisible by batch.micro_batch_size=1 x 3 data-parallel replicas; use 6 or 9"),
        (4, 3, "zero_optimization.stage=3 (DeepSpeed configuration) with parallel.pipeline_parallel_size=2"),
        (4, 0, "clips the gradients of pipeline stages wrongly; use ds_configs/zero1.json"),
    ],
)  # fmt: skip
def test_what_the_number_of_processes_and_zero_decide(world_size: int, zero_stage: int, expected: str) -> None:
    config = configuration(parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2)
    (finding,) = check.findings(config, world_size, zero_stage)
    assert expected in finding


def test_several_findings_at_once() -> None:
    config = configuration(
        parallel__tensor_parallel_size=5, model__local_window=8, schedule__warmup_steps=5000, data__corpora=[]
    )
    assert len(check.findings(config, world_size=7, zero_stage=1)) == 7


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model__encoder_layers": 0,
            "data__encoder_seq_length": 0,
            "model__encoder_branches": [],
            "objective__prefix_lm": 0,
        },
        {"model__vocab_size": 1001, "parallel__tensor_parallel_size": 2},
        {"model__decoder_branches": ["causal", "axial"], "model__encoder_branches": ["full"], "model__local_window": 8},
        {"parallel__pipeline_parallel_size": 2, "parallel__stage_boundaries": [194]},
        {"batch__global_batch_size": 16, "batch__ramp_up": {"start": 4, "increment": 6, "samples": 9}},
        {
            "parallel__pipeline_parallel_size": 2,
            "parallel__pipeline_schedule": "dualpipev",
            "batch__global_batch_size": 4,
        },
        {"schedule__decay": "wsd", "schedule__warmup_steps": 800},
    ],
)
def test_what_is_allowed(changes: dict[str, Any]) -> None:
    config = configuration(**changes)
    ranks = config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size
    assert check.findings(config, world_size=ranks, zero_stage=1) == []


def test_tools_need_no_corpus() -> None:
    assert check.findings(RunConfig(), None, None, needs_corpus=False) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__decoder_branches": ["axial"]}, "axial alone"),
        ({"model__decoder_branches": [["axial"], ["axial"]]}, "axial alone"),
        ({"model__decoder_layers": 1, "model__decoder_branches": [["causal"], ["local"]]}, "only the first 1 are used"),
        ({"model__mlm_head": False}, "nothing predicts"),
        ({"objective__masked_prefix": 0}, "never trained"),
    ],
)
def test_what_is_unwise(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in notice for notice in check.notices(configuration(**changes)))


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 6))
def test_suggested_batch_sizes_work(size: int, micro: int, replicas: int) -> None:
    config = configuration(batch__global_batch_size=size, batch__micro_batch_size=micro)
    found = check.findings(config, world_size=replicas, zero_stage=1)
    assert bool(found) == (size % (micro * replicas) != 0)
    if found:
        suggested = int(found[0].rsplit(" ", 1)[1])
        assert not check.findings(
            configuration(batch__global_batch_size=suggested, batch__micro_batch_size=micro), replicas, 1
        )


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert check.divisors(number) == [candidate for candidate in range(1, number + 1) if number % candidate == 0]


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"batch__ramp_up": {"start": 4, "increment": 4, "samples": 8000}}, "never reaches batch.global_batch_size"),
        ({"data__reweight": [{"from_sample": 8000, "weights": [1]}]}, "data.reweight[0].from_sample lies behind"),
    ],
)
def test_what_begins_after_the_end_is_noticed(changes: dict[str, Any], notice: str) -> None:
    assert [each for each in check.notices(configuration(**changes)) if notice in each]


def test_a_tool_may_read_a_model_with_shorter_texts() -> None:
    short = configuration(data__encoder_seq_length=64, data__decoder_seq_length=64)
    assert check.findings(short, world_size=1, zero_stage=1, needs_training_text=False) == []


def test_a_rank_that_is_to_be_traced_exists() -> None:
    config = configuration(training__profile_steps=[3, 4], training__profile_ranks=[0, 8])
    assert any("names rank 8 of 8 processes" in finding for finding in check.findings(config, 8, 1))
    assert check.findings(configuration(training__profile_steps=[3, 4], training__profile_ranks=[0, 7]), 8, 1) == []
