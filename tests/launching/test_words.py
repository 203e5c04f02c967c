"""Whatever a user writes is data in a script: it comes back as it was, or the script is not written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_omega.errors import ConfigError
from megatron_omega.launching import scripts, words

HOSTILE = (
    "a\nb",
    "it's",
    '"',
    "$(touch x)",
    "`touch x`",
    "-x",
    "",
    " ",
    "a b",
    "#",
    "\\",
    "%h",
    "\x1b[0m",
    "$HOME",
    "*",
    "~",
    "{a,b}",
)
texts = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))


@settings(max_examples=60)
@given(st.lists(texts, max_size=4), texts, texts, texts)
@example(["$(touch x)"], "a b", "x", "--comment=a b")
def test_a_batch_script_says_what_was_meant_or_is_not_written(
    arguments: list[str], path: str, name: str, option: str
) -> None:
    launch = scripts.Launch(tuple(arguments), 1, 1, command="a test", program="PROGRAM", options=(option,))
    try:
        text = scripts.slurm_script(launch, Path(path), name)
    except ConfigError:
        assert any(words._CONTROL.search(word) for word in (*arguments, path, option)) or not words._OPTION.fullmatch(
            option
        )
        return
    head, _, body = text.partition("set -u\n")
    assert all(line.startswith("#") for line in head.splitlines())  # nothing of it is for bash
    line = next(line for line in body.splitlines() if line.startswith("run="))
    shown = subprocess.run(
        ["bash", "-c", f'{line}; printf "%s\\0" "${{run[@]}}"'], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split("\0")[:-1] == ([*arguments] or [""])  # printf without words prints one empty one


@settings(max_examples=60)
@given(texts)
def test_what_pdsh_passes_on_is_read_as_it_was(word: str) -> None:
    try:
        words.require_words_for_pdsh([word], {}, {})
    except ConfigError:
        return
    sent = '"{}"'.format(word.replace('"', '\\"')) if " " in word else word  # as DeepSpeed's PDSHRunner does
    assert "%" not in sent or " " not in word
    shown = subprocess.run(["sh", "-c", f"printf '%s\\0' {sent}"], capture_output=True, text=True, check=True, cwd="/")
    assert shown.stdout == word + "\0"


@pytest.mark.parametrize("word", HOSTILE)
def test_what_a_shell_would_change_is_refused_for_pdsh(word: str) -> None:
    if word in ("-x", "a b", " "):
        words.require_words_for_pdsh([word], {}, {})
    else:
        with pytest.raises(ConfigError):
            words.require_words_for_pdsh([word], {}, {})


def test_places_and_variables_for_pdsh_are_checked_too() -> None:
    words.require_words_for_pdsh([], {"the folder": "/home/me/omega-1.0"}, {"PATH": "/usr/bin:/my programs"})
    with pytest.raises(ConfigError) as caught:
        words.require_words_for_pdsh(["$x"], {"the folder": "/home/a b"}, {"PATH": "$(id)", "HF_HOME": 'a"b'})
    assert len(caught.value.findings) == 4


def test_hosts_are_names_each_once() -> None:
    words.require_hosts(["n1", "gpu-003.cluster.example", "10.0.0.1"])
    with pytest.raises(ConfigError) as caught:
        words.require_hosts(["n[1-8]", "-x", "n1", "a b", "n1", "$(id)", "n1;id", "", "n1\n"])
    assert len(caught.value.findings) == 8 and "n1 2 times" in caught.value.findings[-1]


@pytest.mark.parametrize("time", ["24:00:00", "30", "2-12", "1-00:30", "UNLIMITED"])
def test_times_of_slurm_pass(time: str) -> None:
    assert words.time_limit(time) == time


@pytest.mark.parametrize("time", ["", "soon", "1:00\n#SBATCH --wrap=id", "1 0", "1:2:3:4"])
def test_other_times_do_not(time: str) -> None:
    with pytest.raises(ConfigError):
        words.time_limit(time)


@pytest.mark.parametrize("option", ["gpu", "--x\nid", "-p=a #b", '--comment="', "--", "--comment=a\\b", ""])
def test_what_is_no_option_is_refused(option: str) -> None:
    with pytest.raises(ConfigError):
        words.sbatch_option(option)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_is_one(port: int) -> None:
    with pytest.raises(ConfigError):
        words.require_port(port)
