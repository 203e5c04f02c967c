"""What a run leaves behind: complete, resumable, and never in the way of training."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omega.config.schema import LoggingConfig, RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host.json_lines import read_objects
from megatron_omega.monitoring import (
    EventsFile,
    LossPlot,
    MetricsFile,
    ProgressBar,
    TensorBoard,
    Wandb,
    monitoring_hooks,
)
from megatron_omega.monitoring.epochs import EpochLog, Epochs
from megatron_omega.monitoring.files import keep_steps
from megatron_omega.monitoring.plot import MOST_POINTS, plot_losses, series
from megatron_omega.monitoring.progress import RunningLosses, describe_step
from megatron_omega.monitoring.trackers import run_id
from megatron_omega.training.hooks import Hook, Hooks
from megatron_omega.training.state import (
    BadStep,
    EvaluationReport,
    Fault,
    Rollback,
    RunContext,
    StepReport,
    TrainState,
)

REPORT = StepReport(
    step=1, loss=5.5, lm_loss=5.0, mlm_loss=6.0, grad_norm=0.75, learning_rate=1e-3, consumed_samples=8,
    consumed_tokens=4096, tokens_per_second=12345.6, step_seconds=0.33, mfu=0.312, skipped=False,
)  # fmt: skip
VALIDATION = EvaluationReport(step=2, loss=4.0, lm_loss=3.5, mlm_loss=4.5)


def context(folder: Path, step: int = 0, **logging_fields: Any) -> RunContext:
    config = RunConfig.model_validate({"training": {"train_steps": 10}, "logging": logging_fields})
    return RunContext(config, folder, TrainState(step=step), details={"layout": "2 x 2 x 2"})


def write_steps(folder: Path, first: int, last: int, hook: MetricsFile | None = None) -> None:
    hook = hook or MetricsFile()
    hook.on_start(context(folder, step=first - 1))
    for step in range(first, last + 1):
        hook.on_step_end(replace(REPORT, step=step, loss=100.0 * first + step))
    hook.on_close()


def test_metrics_have_the_promised_fields(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 1)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    promised = """step loss lm_loss mlm_loss grad_norm learning_rate consumed_samples consumed_tokens
        tokens_per_second step_seconds mfu skipped"""
    assert " ".join(row) == " ".join(promised.split())


def test_a_line_is_readable_before_the_run_ends(tmp_path: Path) -> None:
    hook = MetricsFile()
    hook.on_start(context(tmp_path))
    hook.on_step_end(REPORT)
    assert [row["step"] for row in read_objects(tmp_path / "metrics.jsonl")] == [1]
    hook.on_close()


def test_resuming_replaces_the_steps_that_are_done_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 9)
    rows = list(read_objects(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] > 500 for row in rows] == [False] * 4 + [True] * 5


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    write_steps(tmp_path, 3, 4)
    assert [row["step"] for row in read_objects(path)] == [1, 2, 3, 4]


def test_a_fresh_start_sets_an_older_run_aside(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    write_steps(tmp_path, 1, 1)
    assert len(list(read_objects(tmp_path / "metrics.jsonl"))) == 1
    assert len(list(read_objects(tmp_path / "metrics.previous.jsonl"))) == 3


@given(st.lists(st.integers(1, 50), unique=True).map(sorted), st.integers(1, 60), st.binary(max_size=10))
def test_keep_steps(tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int, rest: bytes) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step":%d}\n' % step for step in steps) + b"{" + rest.replace(b"\n", b""))
    keep_steps(path, last)
    assert [row["step"] for row in read_objects(path)] == [step for step in steps if step <= last]
    assert path.read_bytes().endswith(b"\n") or path.stat().st_size == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null(tmp_path: Path, value: float) -> None:
    hook = MetricsFile()
    hook.on_start(context(tmp_path))
    hook.on_step_end(replace(REPORT, grad_norm=value, skipped=True))
    hook.on_close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["grad_norm"] is None and row["skipped"] is True


def test_events_tell_the_story(tmp_path: Path) -> None:
    events = EventsFile()
    for _ in range(2):
        events.on_start(context(tmp_path, step=4))
        events.on_step_end(replace(REPORT, step=5, grad_norm=math.inf, skipped=True))
        events.on_evaluate(VALIDATION)
        events.on_checkpoint(tmp_path / "step-00000005", 5)
        events.on_stop_requested("SIGTERM")
        events.on_error(ConfigError("wrong"))
        events.on_error(ZeroDivisionError("a bug"))
        events.on_close()
    rows = list(read_objects(tmp_path / "events.jsonl"))
    names = ["start", "skipped_step", "evaluate", "checkpoint", "stop_requested", "error", "error", "close"]
    assert [row["event"] for row in rows] == 2 * names
    assert rows[0]["layout"] == "2 x 2 x 2" and rows[0]["step"] == 4
    assert rows[2]["lm_loss"] == 3.5
    assert rows[5]["traceback"] is None and "ZeroDivisionError" in rows[6]["traceback"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    stream = Terminal()
    bar = ProgressBar(LoggingConfig(), stream)
    bar.on_start(context(tmp_path, step=4))
    bar.on_step_end(replace(REPORT, step=5))
    bar.on_evaluate(VALIDATION)
    bar.on_close()
    shown = stream.getvalue()
    assert "4/10" in shown and "5/10" in shown
    assert "validation after step 2: loss 4.0000 (lm 3.5000, mlm 4.5000)" in shown


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="megatron_omega")
    return caplog


@pytest.mark.parametrize(("stream", "progress_bar"), [(io.StringIO(), True), (Terminal(), False)])
def test_lines_elsewhere(tmp_path: Path, lines: pytest.LogCaptureFixture, stream: Any, progress_bar: bool) -> None:
    bar = ProgressBar(LoggingConfig(interval_steps=4, progress_bar=progress_bar), stream)
    bar.on_start(context(tmp_path))
    for step in range(1, 11):
        bar.on_step_end(replace(REPORT, step=step))
    bar.on_close()
    assert [message.partition(":")[0] for message in lines.messages] == ["step 4/10", "step 8/10", "step 10/10"]
    assert stream.getvalue() == ""


def test_a_line_has_every_number_with_its_unit() -> None:
    report = replace(REPORT, step=1000, skipped=True, mlm_loss=math.nan)
    line = describe_step(report, RunningLosses().describe(report), 2000, 3661.2)
    assert line == (
        "step 1,000/2,000: lm 5.0000, mlm -, grad norm 0.75, learning rate 0.001, 12,346 tokens/s, MFU 31.2%, "
        "0.33 s, 1:01:01 left, SKIPPED"
    )


def test_the_mlm_loss_of_a_line_does_not_jump() -> None:
    losses = RunningLosses()
    values = [math.nan, 6.0, math.nan, 8.0]
    shown = [losses.describe(replace(REPORT, mlm_loss=value)).partition("mlm ")[2] for value in values]
    assert shown == ["-", "6.0000", "6.0000", "6.2000"]


def test_passes_through_the_text_are_counted_and_told(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    def epochs_at(samples: int) -> Epochs:
        return Epochs(samples / 40, {"a": samples / 20, "b": 0.0})

    hooks = Hooks([MetricsFile(epochs_at), EpochLog(epochs_at)])
    hooks.on_start(context(tmp_path))
    for step in range(1, 7):
        hooks.on_step_end(replace(REPORT, step=step, consumed_samples=8 * step))
    hooks.on_close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert rows[2]["corpus_epochs"] == {"a": 1.2, "b": 0.0}
    assert [line for line in lines.messages if "begins again" in line] == [
        "step 3: corpus a has been read once and begins again",
        "step 5: corpus a has been read 2 times and begins again",
    ]


def test_an_unknown_mfu_is_left_out() -> None:
    assert "MFU" not in describe_step(replace(REPORT, mfu=math.nan), "", 10, 1.0)


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **run: Any) -> list[dict[str, Any]]:
    """Put a stand-in for the wandb module in place; return what `init` was called with."""
    started: list[dict[str, Any]] = []

    def init(**keywords: Any) -> Any:
        started.append(keywords)
        return SimpleNamespace(**{"define_metric": lambda *_, **__: None} | run)

    module = SimpleNamespace(init=init, Settings=lambda **keywords: keywords)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    return started


def test_one_wandb_run_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    ended: list[int] = []
    axes: list[tuple[str, str]] = []
    started = fake_wandb(
        monkeypatch, log=logged.append, finish=lambda: ended.append(1),
        define_metric=lambda name, step_metric: axes.append((name, step_metric)),
    )  # fmt: skip
    for step in (0, 5):
        hook = Wandb(LoggingConfig(wandb="offline"))
        hook.on_start(context(tmp_path, step=step))
        hook.on_step_end(replace(REPORT, step=step + 1))
        hook.on_close()
    assert len({call["id"] for call in started}) == 1 and started[0]["id"] == run_id(tmp_path)
    assert {call["mode"] for call in started} == {"offline"}
    assert [values["step"] for values in logged] == [1, 6] and logged[0]["train/lm_loss"] == 5.0
    assert axes[:2] == [("train/*", "step"), ("validation/*", "step")]  # a step that is done again is not dropped
    assert ended == [1, 1]


def test_wandb_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    hook = Wandb(LoggingConfig(wandb="offline"))
    hook.on_start(context(tmp_path))
    hook.on_step_end(REPORT)
    assert hook._sink is not None, "writing failed"
    hook.on_close()
    assert list(tmp_path.glob(f"wandb/offline-run-*-{run_id(tmp_path)}/*.wandb"))


def boom(*_: Any, **__: Any) -> None:
    raise RuntimeError("no network")


@pytest.mark.parametrize("where", ["import", "init", "log", "finish"])
def test_wandb_never_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: pytest.LogCaptureFixture, where: str
) -> None:
    if where == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        calls = {name: boom if name == where else (lambda *_, **__: None) for name in ("log", "finish")}
        fake_wandb(monkeypatch, **calls)
        if where == "init":
            monkeypatch.setattr(sys.modules["wandb"], "init", boom)
    hook = Wandb(LoggingConfig(wandb="online"))
    hook.on_start(context(tmp_path))
    for step in (1, 2, 3):
        hook.on_step_end(replace(REPORT, step=step))
    hook.on_evaluate(VALIDATION)
    hook.on_close()
    (message,) = lines.messages
    assert message.startswith("Weights & Biases (logging.wandb) failed and is off")


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step in (0, 2):
        hook = TensorBoard()
        hook.on_start(context(tmp_path, step=step))
        for done in range(step + 1, step + 4):
            hook.on_step_end(replace(REPORT, step=done, loss=10.0 * step + done))
        hook.on_evaluate(replace(VALIDATION, step=step))
        hook.on_close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {field.name for field in fields(StepReport)} - {"step"}
    assert {f"train/{name}" for name in names} <= {*events.Tags()["scalars"]}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)
    ]  # fmt: skip


def test_the_plot_is_drawn_from_the_files(tmp_path: Path) -> None:
    assert plot_losses(tmp_path) is None
    hooks = Hooks([MetricsFile(), EventsFile(), LossPlot()])
    hooks.on_start(context(tmp_path))
    hooks.on_step_end(replace(REPORT, mlm_loss=math.nan))
    hooks.on_evaluate(VALIDATION)
    first = (tmp_path / "loss.png").read_bytes()
    hooks.on_step_end(replace(REPORT, step=2, lm_loss=1.0))
    hooks.on_close()
    last = (tmp_path / "loss.png").read_bytes()
    assert first.startswith(b"\x89PNG") and last.startswith(b"\x89PNG") and first != last
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "events.jsonl", "loss.png"}


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    (tmp_path / "loss.png" / "in the way").mkdir(parents=True)
    write_steps(tmp_path, 1, 1)
    plot = LossPlot()
    plot.on_start(context(tmp_path))
    plot.on_evaluate(VALIDATION)
    plot.on_close()
    (message,) = lines.messages
    assert message.startswith("loss.png is not drawn any more")


def test_long_curves_are_thinned() -> None:
    rows = [{"step": step, "loss": None if step % 2 else float(step)} for step in range(10 * MOST_POINTS)]
    steps, values = series(rows, "loss")
    assert MOST_POINTS // 2 < len(steps) <= MOST_POINTS
    assert values == [float(step) for step in steps]


def test_steps_done_again_after_a_rollback_replace_the_old(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hooks = Hooks([EventsFile(), MetricsFile(), TensorBoard()])
    hooks.on_start(context(tmp_path))
    for step in range(1, 6):
        hooks.on_step_end(replace(REPORT, step=step, loss=float(step)))
    hooks.on_rollback(Rollback("why", 5, 2, 1, TrainState(step=2, left_out=((24, 40),))))
    for step in range(3, 5):
        hooks.on_step_end(replace(REPORT, step=step, loss=10.0 * step))
    hooks.on_close()
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert [(row["step"], row["loss"]) for row in read_objects(tmp_path / "metrics.jsonl")] == expected
    back = next(row for row in read_objects(tmp_path / "events.jsonl") if row["event"] == "rollback")
    assert (back["step"], back["to_step"], back["lost_steps"], back["left_out"]) == (5, 2, 3, [[24, 40]])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


def test_trouble_is_said_in_words(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    bar, documents = ProgressBar(LoggingConfig(progress_bar=False)), [{"shard": "s", "document": 3}]
    events = EventsFile(lambda samples: documents if samples == [range(8, 16)] else [])
    for hook in (bar, events):
        hook.on_start(context(tmp_path))
        hook.on_bad_step(BadStep(9, "loss spike", 9.5, 9.0, 12.34, 1.0, 2, ((8, 16),)))
        hook.on_bad_step(BadStep(10, "gradient not finite", 2.5, 2.0, 0.1, math.inf, 3, ((16, 24),)))
        hook.on_fault(Fault("silent_fault", "the weights of rank 3 differ", (3,), {"hosts": ["n1"]}))
        hook.on_rollback(Rollback("3 bad steps in a row", 10, 6, 1, TrainState(step=6)))
        hook.on_rollback(Rollback("3 bad steps in a row", 10, 10, 2, TrainState(step=10)))
    assert lines.messages[0].startswith("step 9 was skipped: loss spike: LM loss 9.0000, 12.3 robust deviations above")
    assert "step 10 was skipped: gradient not finite, loss 2.5000 (bad step 3 in a row" in lines.messages[1]
    assert lines.messages[2:4] == [
        "the weights of rank 3 differ", "3 bad steps in a row: back to the checkpoint of step 6 (rollback 1)",
    ]  # fmt: skip
    assert "no checkpoint to go back to" in lines.messages[4]
    rows = [row for row in read_objects(tmp_path / "events.jsonl") if row["event"] != "start"]
    assert [row["event"] for row in rows] == ["bad_step", "bad_step", "silent_fault", "rollback", "rollback"]
    assert (rows[0]["documents"], rows[1]["documents"], rows[1]["grad_norm"]) == (documents, [], None)
    assert (rows[2]["ranks"], rows[2]["hosts"]) == ([3], ["n1"])


def test_only_the_main_rank_writes() -> None:
    everything = LoggingConfig(wandb="offline")
    assert monitoring_hooks(everything, is_main=False) == []
    kinds = [type(hook) for hook in monitoring_hooks(everything, is_main=True)]
    assert kinds == [EventsFile, MetricsFile, ProgressBar, TensorBoard, Wandb, LossPlot]
    assert Wandb not in map(type, monitoring_hooks(LoggingConfig(), is_main=True))


class Recorder(Hook):
    def __init__(self, calls: list[str], *, fails: bool = False) -> None:
        self.calls, self.fails = calls, fails

    def on_step_end(self, report: StepReport) -> None:
        self.calls.append("step")

    def on_close(self) -> None:
        self.calls.append("close")
        if self.fails:
            raise OSError("disk full")


def test_a_hook_that_fails_at_the_end_lets_the_others_close(lines: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    hooks = Hooks([Recorder(calls, fails=True), Recorder(calls)])
    hooks.on_step_end(REPORT)
    hooks.on_close()
    assert calls == ["step", "step", "close", "close"]
    assert lines.messages == ["Recorder failed while the run was ending: disk full"]


def test_every_hook_method_is_forwarded() -> None:
    methods = [name for name in vars(Hook) if name.startswith("on_")]
    assert all(name in vars(Hooks) for name in methods)


def test_state_survives_json() -> None:
    state = TrainState(step=3, consumed_samples=24, consumed_tokens=999, skipped_steps=1, best_validation_loss=2.5)
    stored = json.loads(json.dumps(state.to_json()))
    assert TrainState.from_json({**stored, "of_a_later_version": 1}) == state
