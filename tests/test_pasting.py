"""Every command that a page, a help page or the demo shows works as it stands there: run, or parsed and with a reason."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tiny import ROOT
from workplace import build, call

from megatron_omega.commands.demo import last_words
from megatron_omega.commands.main import VERBS
from megatron_omega.config.arguments import settings
from megatron_omega.host.command_line import CommandLine

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/README.md"))]
PROGRAM = re.compile(
    r"(megatron-omega|python|make|bash|deepspeed|torchrun|srun|sbatch|pip|docker|tensorboard|source) "
    r"|[A-Z]+=\S+ |benchmarks/\w+\.py|\.venv/bin/"
)
"""What a command of a page begins with."""
NEEDS = {"lm_eval": "megatron-omega lm-eval", "transformers": "folder/of/transformers"}
"""Library of an extra -> sign of the commands that cannot do without it."""
SHARD_SUFFIXES = (".bin", ".idx", ".json", ".npz", ".sums")
NOT_RUN = yaml.safe_load((ROOT / "tests/pasting.yaml").read_text())


class Shown(NamedTuple):
    """One command, and where it stands."""

    where: str
    command: str
    answer: str
    """What the page shows as its output; empty if nothing."""


def blocks(text: str) -> Iterator[str]:
    # Blocks of every language are matched, so that the end of one is never taken for the beginning of the next.
    for language, block in re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in ("", "bash", "sh", "console"):
            yield re.sub(r"\\\n\s*", " ", block)


def of_block(where: str, block: str) -> Iterator[Shown]:
    if block.startswith("$ "):
        command, _, answer = block.removeprefix("$ ").partition("\n")
        yield Shown(where, command, answer)
        return
    for line in block.splitlines():
        command = re.split(r"\s+#|\s{3,}", line.strip())[0]
        if PROGRAM.match(command):
            yield Shown(where, command, "")


def of_help_pages() -> Iterator[Shown]:
    for verb in VERBS:
        text = call([verb, "--help"])[1]
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            command = re.split(r"\s+\[(?=-)|\s{3,}(?=\S)", line.strip())[0]
            if re.match(r"(megatron-omega [a-z]|(srun|torchrun|deepspeed) \S*(-|_|\.py))", command):
                yield Shown(f"{verb} --help", command.split("   ")[0], "")


def every_command() -> list[Shown]:
    found = [one for page in PAGES for block in blocks(page.read_text())
             for one in of_block(page.relative_to(ROOT).as_posix(), block)]  # fmt: skip
    found += of_help_pages()
    words = (re.sub(r"^  .{17} ", "", line) for line in last_words(Path("runs/omega-tiny")) if line.startswith("  "))
    found += [Shown("demo", command, "") for command in words if PROGRAM.match(command)]
    return list({(one.command, one.answer): one for one in found}.values())


COMMANDS = every_command()


def reason_of(command: str) -> str | None:
    """Say why a command is only parsed."""
    return next((entry["reason"] for entry in NOT_RUN if re.search(entry["match"], command)), None)


def words_of(command: str) -> list[str] | None:
    """Return verb and options of a command that is ours, under whatever starts it; None if it is none."""
    words = shlex.split(command)
    for name, verb in (("megatron-omega", None), ("megatron_omega", None), ("pretrain_omega.py", "train")):
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
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: texts, shards, runs, models, tasks."""
    folder = tmp_path_factory.mktemp("pasted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        build()
    return folder


@pytest.fixture
def workplace(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy for one command, as the working directory."""
    folder = shutil.copytree(filled, tmp_path / "workplace")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return folder


def clear_outputs(words: list[str], folder: Path) -> None:
    """Remove what the command itself is to make, which is there for the commands that read it."""
    if words[0] == "finetune":
        words = [*words, "--output", "runs/omega-tiny-finetuned"]
    for option, name in pairwise(words):
        if option in ("--output", "--logging.run_directory"):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).unlink(missing_ok=True)
        if option == "--output-prefix":
            for path in folder.glob(f"{name}*"):
                if path.suffix in SHARD_SUFFIXES:
                    path.unlink()


RUN = [one for one in COMMANDS if reason_of(one.command) is None]
PARSED = [one for one in COMMANDS if reason_of(one.command) is not None]


@pytest.mark.parametrize("shown", RUN, ids=lambda shown: f"{shown.where}: {shown.command[:60]}")
def test_a_command_runs_as_it_stands(shown: Shown, workplace: Path) -> None:
    for library, sign in NEEDS.items():
        if sign in shown.command:
            pytest.importorskip(library, reason=f"{library} is not installed")
    words = words_of(shown.command)
    assert words, f"{shown.command}: neither ours nor listed in tests/pasting.yaml"
    clear_outputs(words, workplace)
    code, said = call(words)
    assert "Traceback" not in said
    if shown.answer:
        assert said.strip() == shown.answer.strip()
    else:
        assert code == 0, said


@pytest.mark.parametrize("shown", PARSED, ids=lambda shown: f"{shown.where}: {shown.command[:60]}")
def test_a_command_that_is_not_run_is_parsed(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    words = words_of(shown.command)
    if words is not None and words[0] in VERBS and not shown.command.endswith(" ..."):
        parse(words, monkeypatch)
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
