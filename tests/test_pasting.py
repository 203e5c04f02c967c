"""Every command that a page, a help page or the demo shows works as it stands there: run, or parsed and with a reason."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tiny import ROOT
from written_models import write_run

from megatron_omega.commands.demo import last_words
from megatron_omega.commands.main import VERBS, main
from megatron_omega.config.arguments import settings
from megatron_omega.host.command_line import CommandLine

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
PROGRAMS = ("megatron-omega ", "python ", "make ", "bash ", "deepspeed ", "torchrun ", "srun ", "sbatch ", "pip ", "docker ",
            "tensorboard ", "RUN=", "source ")  # fmt: skip
NOT_RUN = yaml.safe_load((ROOT / "tests/pasting.yaml").read_text())


class Shown(NamedTuple):
    """One command, and where it stands."""

    where: str
    command: str
    answer: str
    """What the page shows as its output; empty if nothing."""


def blocks(text: str) -> Iterator[str]:
    for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield re.sub(r"\\\n\s*", " ", block)


def of_block(where: str, block: str) -> Iterator[Shown]:
    if block.startswith("$ "):
        command, _, answer = block.removeprefix("$ ").partition("\n")
        yield Shown(where, command, answer)
        return
    for line in block.splitlines():
        command = re.split(r"\s+#|\s{6,}", line.strip())[0]
        if command.startswith(PROGRAMS):
            yield Shown(where, command, "")


def of_help_pages() -> Iterator[Shown]:
    for verb, module in VERBS.items():
        text = importlib.import_module(f"megatron_omega.commands.{module}").__doc__ or ""
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            command = re.split(r"\s+\[(?=-)|\s{3,}(?=\S)", line.strip())[0]
            if re.match(r"(srun )?megatron-omega [a-z]", command):
                yield Shown(f"{verb} --help", command.split("   ")[0], "")


def every_command() -> list[Shown]:
    found = [one for page in PAGES for block in blocks(page.read_text())
             for one in of_block(page.relative_to(ROOT).as_posix(), block)]  # fmt: skip
    found += of_help_pages()
    words = (re.sub(r"^  .{17} ", "", line) for line in last_words(Path("runs/omega-tiny")) if line.startswith("  "))
    found += [Shown("demo", command, "") for command in words if command.startswith(PROGRAMS)]
    return list({(one.command, one.answer): one for one in found}.values())


COMMANDS = every_command()


def reason_of(command: str) -> str | None:
    """Say why a command is only parsed."""
    return next((entry["reason"] for entry in NOT_RUN if re.search(entry["match"], command)), None)


def words_of(command: str) -> list[str] | None:
    """Return verb and options of a command that is ours, under whatever starts it; None if it is none."""
    words = shlex.split(command)
    for name, verb in (("megatron-omega", None), ("pretrain_omega.py", "train")):
        if name in words:
            rest = words[words.index(name) + 1 :]
            return rest if verb is None else [verb, *rest]
    return None


class _ParsedError(Exception):
    pass


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the verb's own parser read the words; every setting among them must exist."""
    known, original = {setting.name for setting in settings()}, CommandLine.parse_known_args

    def stop(self: CommandLine, args: Any = None, namespace: Any = None) -> Any:
        _, rest = original(self, args, namespace)
        unknown = [word for word in rest if word.startswith("--") and word[2:].partition("=")[0] not in known]
        hands_on = (
            "--config" in rest or words[0] == "lm-eval"
        )  # launch a whole command line, lm-eval the harness's options
        assert not unknown or hands_on, unknown
        raise _ParsedError

    monkeypatch.setattr(CommandLine, "parse_known_args", stop)
    with pytest.raises(_ParsedError):
        importlib.import_module(f"megatron_omega.commands.{VERBS[words[0]]}").main(words[1:])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that is called as the pages call the demo's."""
    folder = tmp_path_factory.mktemp("pasted")
    write_run(folder / "runs/omega-tiny")
    (folder / "a.txt").write_text("This function")
    (folder / "b.txt").write_text("A class")
    (folder / "runs/omega-tiny/events.jsonl").write_text(
        '{"time": "2026-01-01T00:00:00+00:00", "event": "start", "uptime_seconds": 1.0}\n'
    )
    return folder


RUN = [one for one in COMMANDS if reason_of(one.command) is None]
PARSED = [one for one in COMMANDS if reason_of(one.command) is not None]


@pytest.mark.parametrize("shown", RUN, ids=lambda shown: f"{shown.where}: {shown.command[:60]}")
def test_a_command_runs_as_it_stands(shown: Shown, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(shown.command)
    assert words, f"{shown.command}: neither ours nor listed in tests/pasting.yaml"
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    said, complained, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(complained):
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
    if shown.answer:
        assert (said.getvalue() + complained.getvalue()).strip() == shown.answer.strip()
    else:
        assert code == 0, complained.getvalue()


@pytest.mark.parametrize("shown", PARSED, ids=lambda shown: f"{shown.where}: {shown.command[:60]}")
def test_a_command_that_is_not_run_is_parsed(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(shown.command)
    if words is not None and words[0] in VERBS:
        parse([word for word in words if word != "..."], monkeypatch)
        return
    program, *rest = shlex.split(shown.command)
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), rest[0]
    for word in rest:
        if word.startswith(("examples/", "ds_configs/", "docs/", "benchmarks/")):
            # A script for hosts is written by the command above it.
            assert (ROOT / word).exists() or word.endswith("hosts.sh"), word


def test_both_ways_are_used_and_every_reason_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = Counter(reason_of(one.command) for one in PARSED)
    with capsys.disabled():
        sys.stdout.write(f"\n{len(RUN)} commands run, {len(PARSED)} parsed: {dict(reasons)}\n")
    assert len(RUN) >= 10 and len(PARSED) >= 20 and all(reasons)
