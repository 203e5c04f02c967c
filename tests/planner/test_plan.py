"""Layouts, memory, ranking, and the tool itself."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_omega import accounting
from megatron_omega.config.arguments import Arguments
from megatron_omega.config.deepspeed import read_deepspeed_json
from megatron_omega.config.load import load_config, resolve_run
from megatron_omega.config.schema import BatchConfig, DataConfig, ModelConfig, RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.planner.candidates import Candidate, grids, obstacle, parse_label, variants
from megatron_omega.planner.estimate import Planner
from megatron_omega.planner.hardware import find_hardware, read_hardware
from megatron_omega.planner.operations import Assumptions, operations
from megatron_omega.planner.plan_files import ZERO, write_plan
from megatron_omega.planner.ranking import best_per_grid, nothing_fits, rank
from megatron_omega.planner.report import gantt, memory_bars

ROOT = Path(__file__).parents[2]
H100 = find_hardware("h100-80g")
OMEGA = RunConfig(batch=BatchConfig(global_batch_size=512))
SMALL = RunConfig(
    model=ModelConfig(
        hidden_size=256, ffn_hidden_size=1024, num_attention_heads=8, encoder_layers=4, decoder_layers=4,
        vocab_size=4096, local_window=64,
    ),
    data=DataConfig(encoder_seq_length=256, decoder_seq_length=256),
    batch=BatchConfig(global_batch_size=32),
)  # fmt: skip


def test_labels_name_their_layout() -> None:
    for candidate in [v for grid in grids(16) for v in variants(grid)]:
        assert parse_label(candidate.label) == candidate
    with pytest.raises(ConfigError, match="no known form"):
        parse_label("tp2-pp2")


def test_grids_are_all_ways_to_multiply_to_the_number_of_ranks() -> None:
    found = list(grids(96))
    assert len({(c.tensor, c.pipeline) for c in found}) == len(found) == 63  # 2^5 x 3: 21 x 3 ways
    assert all(c.world_size == 96 for c in found)


def test_a_ranking_judges_every_layout_and_orders_the_legal_ones() -> None:
    ranking = rank(SMALL, H100, 8)
    assert ranking.total == sum(1 for grid in grids(8) for _ in variants(grid))
    seconds = [estimate.step_seconds for estimate in ranking.fitting]
    assert seconds[12:] == sorted(seconds[12:]) and seconds[:12] == sorted(seconds[:12])
    assert all(obstacle(SMALL, estimate.candidate) is None for estimate in ranking.fitting)
    reasons = " ".join(refusal.reason for refusal in ranking.refused.values())
    assert all(words in reasons for words in ("dualpipev needs at least", "does not combine with pipeline stages"))
    assert len(best_per_grid(ranking)) <= 10


@pytest.mark.parametrize("change", ["recompute", "data", "zero_stage", "sequence_parallel"])
def test_what_saves_memory_saves_memory(change: str) -> None:
    planner = Planner(OMEGA, H100)
    base = Candidate(4, 1, 8, recompute="none", zero_stage=1)
    leaner = {
        "recompute": replace(base, recompute="full"),
        "data": replace(base, data=64),
        "zero_stage": replace(base, zero_stage=3),
        "sequence_parallel": replace(base, sequence_parallel=True),
    }
    assert planner.estimate(leaner[change]).peak_memory < planner.estimate(base).peak_memory


def test_recompute_modes_trade_memory_for_flops() -> None:
    planner = Planner(OMEGA, H100)
    kept, flops = [], []
    for recompute in ("none", "swiglu", "ffn", "full"):
        works = planner.works(Candidate(1, 1, 1, recompute=recompute))
        kept.append(works["encoder"].kept)
        flops.append(works["encoder"].total_flops)
    assert kept == sorted(kept, reverse=True) and len({*kept}) == 4
    assert flops == sorted(flops) and flops[0] == flops[1]
    assert kept[3] == 2048 * 960 * 2  # 3.75 MiB a layer


def test_every_parameter_is_on_exactly_one_rank_the_tied_table_apart() -> None:
    planner = Planner(OMEGA, H100)
    for candidate in (Candidate(1, 8, 1), Candidate(1, 8, 1, schedule="dualpipev"), Candidate(1, 1, 8)):
        estimate = planner.estimate(candidate)
        works = planner.works(candidate)
        held = sum(stage.parameters(estimate.config, works) for stage in estimate.stages)
        assert held + accounting.table_parameters(OMEGA.model) == accounting.parameter_count(OMEGA.model)


def test_the_closed_form_of_the_pipeline_is_close_to_the_clock() -> None:
    planner = Planner(OMEGA, H100)
    for label in ("tp1-pp8-dp8-mb1-full-zero1", "tp2-pp16-dp2-mb1-full-zero1", "tp1-pp8v-dp4-mb1-full-zero1"):
        candidate = parse_label(label)
        closed, exact = planner.estimate(candidate), planner.estimate(candidate, exact=True)
        assert closed.step_seconds == pytest.approx(exact.step_seconds, rel=0.06)


def test_texts_show_the_whole_plan() -> None:
    estimate = Planner(OMEGA, H100).estimate(parse_label("tp1-pp4-dp16-mb1-full-zero1"), exact=True)
    bars, chart = list(memory_bars(estimate)), list(gantt(estimate.timeline))
    assert "GiB" in bars[0] and "W weights" in bars[-1]
    assert len(chart) == 5 and set("0a.") <= set(chart[0])


def test_more_failures_less_goodput() -> None:
    estimate = Planner(OMEGA, H100).estimate(parse_label("tp2-pp16-dp8-mb1-full-zero1"))
    rare, often = (operations(estimate, Assumptions(failures_per_gpu_hour=rate)) for rate in (1e-6, 1e-3))
    assert often.goodput < rare.goodput <= 1
    assert often.checkpoint_interval_seconds < rare.checkpoint_interval_seconds
    assert rare.checkpoint_bytes == 12 * 11_934_059_264
    assert rare.steps == -(-100_000_000_000 // (512 * 4096))


def test_nothing_fits_names_the_nearest_thing_that_does() -> None:
    ranking = rank(OMEGA, H100, 1)
    assert not ranking.fitting
    message = str(nothing_fits(OMEGA, H100, 1, ranking))
    assert "needs" in message and "4 x h100-80g would do" in message


def test_tensor_groups_stay_inside_a_node() -> None:
    ranking = rank(SMALL, H100, 16, micro_batches=(1,))
    assert any("do not fit in a node of 8" in refusal.reason for refusal in ranking.refused.values())
    assert all(estimate.candidate.tensor <= 8 for estimate in ranking.fitting)


def test_deepspeed_settings_are_those_of_the_repository() -> None:
    for stage, settings in ZERO.items():
        assert read_deepspeed_json(ROOT / f"ds_configs/zero{stage}.json") == {"zero_optimization": settings}


def test_written_plans_are_accepted_by_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files of 20 random plans pass `pretrain_omega.py --dry-run`, for their number of processes."""
    monkeypatch.syspath_prepend(str(ROOT))
    import pretrain_omega

    config = RunConfig.model_validate(
        {
            **SMALL.model_dump(),
            "data": {**SMALL.data.model_dump(), "tokenizer": "t.model", "corpora": [{"prefix": "c"}]},
        }
    )
    fitting = [e for gpus in (4, 8, 12, 16) for e in rank(config, H100, gpus).fitting]
    for index, estimate in enumerate(random.Random(1).sample(fitting, 20)):
        run, deepspeed, slurm = write_plan(estimate, tmp_path / str(index))
        monkeypatch.setenv("WORLD_SIZE", str(estimate.candidate.world_size))
        pretrain_omega.main(["--config", str(run), "--deepspeed_config", str(deepspeed), "--dry-run"])
        assert f"= {estimate.candidate.world_size} ranks" in capsys.readouterr().out
        resolved = resolve_run(Arguments(config=run, deepspeed_config=deepspeed), estimate.candidate.world_size)
        assert resolved.config == estimate.config == load_config(run)
        assert resolved.deepspeed.zero_stage == estimate.candidate.zero_stage
        assert f"--nodes={-(-estimate.candidate.world_size // 8)}\n" in slurm.read_text()


def _tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/plan.py"), *arguments], capture_output=True, text=True, check=False
    )


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("model: {encoder_layers: 2, decoder_layers: 2}\nbatch: {global_batch_size: 8}\n")
    return str(path)


def test_the_tool_prints_json_a_program_can_read(small: str) -> None:
    ran = _tool("--config", small, "--gpus", "8", "--gpu", "a100-80g", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result["num_fitting"] > 0
    assert result["layouts"][0]["step_seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "0", "--gpu", "h100-80g"), "at least 1"),
        (("--gpus", "8", "--gpu", "h100-80g", "--storage-bandwidth", "0"), "use more than 0"),
        (("--gpus", "8", "--gpu", "h100-80g", "--plot", "nowhere/plan.png"), "there is no folder nowhere"),
        (("--gpus", "8", "--gpu", "h100"), "did you mean h100-80g"),
        (("--gpus", "8", "--gpu", "h100-80g", "--network", "token-ring"), "--network token-ring is not listed"),
        (("--gpus", "8", "--gpu", "h100-80g", "--explain", "tp2-pp2-dp1-mb1-full-zero1"), "has 4 ranks, --gpus says 8"),
        (("--gpus", "8", "--gpu", "h100-80g", "--explain", "tp5-pp1-dp1-mb1-full-zero1"), "has 5 ranks"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(small: str, arguments: tuple[str, ...], said: str) -> None:
    ran = _tool("--config", small, *arguments)
    assert ran.returncode == 2
    assert said in ran.stderr and ran.stderr.count("\n") == 1


def test_planning_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys, runpy; sys.argv = ['plan.py', '--help']\n"
        "try: runpy.run_path('tools/plan.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import megatron_omega.planner.report, megatron_omega.planner.ranking\n"
        "assert not {'torch', 'deepspeed', 'matplotlib'} & set(sys.modules), 'too much was imported'"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_hardware_file_with_a_hole_names_it(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    path.write_text("accelerators: {}\nlinks: {}\n")
    with pytest.raises(ConfigError, match="efficiency: Field required"):
        read_hardware(path)
