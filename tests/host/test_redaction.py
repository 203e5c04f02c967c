"""A canary that is secret is in nothing a run leaves behind."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TinyCorpus

from megatron_omega.config.arguments import Arguments, Override
from megatron_omega.config.schema import RunConfig
from megatron_omega.host.redaction import HIDDEN, RedactingFormatter, is_secret_name, redact, redacted, secrets_of
from megatron_omega.launching.local_ranks import RankFailed, run_ranks
from megatron_omega.studies.layouts import arguments_for, parse_layout

CANARY = "canary-5ecre7-0a1b2c"
URL_CANARY = "canary-of-a-url"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "MY_TOKENS",
        "DB_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "apikey",
        "DB_PASS",
        "ORA_PWD",
        "GITHUB_PAT",
    ],
)
def test_variables_named_like_keys(name: str) -> None:
    assert secrets_of({name: CANARY, "HOME": "/root", "TOKENIZERS_PARALLELISM": "false-false"}) == [CANARY]
    assert secrets_of({name: "1"}) == secrets_of({"MAX_TOKENS": "1000000"}) == []


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "PATH", "MODULEPATH", "BYPASS_CACHE", "PASS_THROUGH", "COMPAT"])
def test_variables_that_are_no_keys(name: str) -> None:
    assert secrets_of({name: "/home/somebody"}) == []


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {CANARY}", f"https://me:{CANARY}@host/x", f"postgres://me:a/b@{CANARY}@host/x",
        f"https://me:{CANARY}/with@more@host", f"--db-pass {CANARY}", f"ORA_PWD={CANARY}", f"github_pat: {CANARY}",
    ],
)  # fmt: skip
def test_what_is_said_like_a_secret_is_hidden(text: str) -> None:
    assert CANARY not in redact(text, {})
    assert redact("see http://n1:8080/a@b and me@host", {}) == "see http://n1:8080/a@b and me@host"


def test_no_setting_of_ours_is_taken_for_a_secret() -> None:
    values = RunConfig().model_dump(mode="json")
    assert redacted(values, {}) == values
    assert not is_secret_name("consumed_tokens") and not is_secret_name("tokenizer") and is_secret_name("hub.token")
    line = "step 5: loss 1.0, 12,345 tokens/s, num_tokens=1234567, tokenizer=/data/tokenizer.model, token 17"
    assert redact(line, {}) == line


@given(st.text(max_size=40), st.text(max_size=40))
def test_a_known_secret_never_stays(before: str, after: str) -> None:
    text = f"{before}{CANARY}{after}"
    environ = {"HF_TOKEN": CANARY}
    assert CANARY not in redact(text, environ)
    assert CANARY not in str(redacted({"a": [{"b": text}], text: 1}["a"], environ))


def test_nested_data() -> None:
    values = {
        "monitor": {"api_key": CANARY, "team": "x"},
        "urls": (f"https://me:{CANARY}@host/x",),
        "n": 3,
        "none": None,
    }
    expected = {"monitor": {"api_key": HIDDEN, "team": "x"}, "urls": [f"https://{HIDDEN}@host/x"], "n": 3, "none": None}
    assert redacted(values, {}) == expected


def test_tracebacks_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    try:
        raise ValueError(CANARY)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed with %s", (CANARY,), sys.exc_info())
    text = RedactingFormatter("%(message)s").format(record)
    assert CANARY not in text and "Traceback" in text and "ValueError" in text


def leaky_run(arguments: Arguments, log: Path) -> None:
    """Train as a process whose environment holds secrets, with a hook that tells them and then fails."""
    from megatron_omega.config.load import resolve_run
    from megatron_omega.host.environment import complete_environment
    from megatron_omega.log import get_logger
    from megatron_omega.run.train import train
    from megatron_omega.training.hooks import Hook

    class Leaky(Hook):
        def on_step_end(self, report: Any) -> None:
            get_logger("megatron_omega.leak").warning("the key is %s", os.environ["WANDB_API_KEY"])
            if report.step == 2:
                raise ValueError(f"cannot log in with {os.environ['HF_TOKEN']}")

    os.environ |= {"WANDB_API_KEY": CANARY, "HF_TOKEN": CANARY[::-1]}
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    place = complete_environment()
    try:
        train(resolve_run(arguments, place.world_size), place, [Leaky()])
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)  # what the interpreter does with it
        raise RuntimeError("as it should") from None


@pytest.mark.distributed
def test_a_canary_is_in_nothing_a_run_leaves_behind(tiny_corpus: TinyCorpus, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    arguments = arguments_for(tiny_corpus.run_yaml, parse_layout("tp1"), [], steps=4, folder=tmp_path)
    own = {
        "checkpoint.interval_steps": "1", "checkpoint.asynchronous": "false", "logging.tensorboard": "true",
        "logging.wandb": "offline", "logging.wandb_project": f"https://me:{URL_CANARY}@host/project",
    }  # fmt: skip
    overrides = (*arguments.overrides, *(Override(*pair) for pair in own.items()))
    with pytest.raises(RankFailed, match="as it should"):
        run_ranks(
            leaky_run, 1, Arguments(arguments.config, arguments.deepspeed_config, overrides), log, timeout_seconds=120
        )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"log.txt", "config.yaml", "events.jsonl", "metrics.jsonl", "manifest.json"} <= names, names
    for path in files:
        content = path.read_bytes()
        for canary in (CANARY, CANARY[::-1], URL_CANARY):
            assert canary.encode() not in content, path
    assert "the key is ***" in log.read_text() and "cannot log in with ***" in log.read_text()
    assert "cannot log in with ***" in (tmp_path / "tp1/events.jsonl").read_text()
