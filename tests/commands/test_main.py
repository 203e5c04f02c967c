"""One entry for every verb: the list, the refusals, and that nothing heavy is imported to say them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, run_python

from megatron_omega import __version__
from megatron_omega.commands.main import GROUPS, VERBS, help_lines, main
from megatron_omega.errors import ConfigError
from megatron_omega.host import shipped
from megatron_omega.host.command_line import CommandLine

SCRIPTS = sorted([*ROOT.glob("tools/*.py"), ROOT / "pretrain_omega.py"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_module_with_a_help_page(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"megatron_omega.commands.{VERBS[verb]}")
    assert module.__doc__
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code in (0, None)
    assert "usage:" in capsys.readouterr().out


def test_the_list_has_a_line_for_each_verb() -> None:
    text = "\n".join(help_lines())
    for verbs in GROUPS.values():
        for verb, (_, line) in verbs.items():
            assert re.search(rf"^  {verb} +{re.escape(line)}$", text, re.MULTILINE)


def test_the_list_and_the_version_need_no_library() -> None:
    libraries = "{'pydantic', 'torch', 'numpy', 'yaml', 'deepspeed', 'psutil'}"
    code = (
        "import sys; from megatron_omega.commands.main import main; main(['--help']); main(['--version']); "
        f"sys.exit(bool({libraries} & set(sys.modules)))"
    )
    done = run_python("-c", code)
    assert done.returncode == 0 and __version__ in done.stdout


def test_an_unknown_verb_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["genrate"])
    assert ended.value.code == 2
    assert "did you mean generate?" in capsys.readouterr().err


def test_verbs_may_be_written_with_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fill_mask", "--help"])
    assert "--text" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_a_few_executable_lines(script: Path) -> None:
    text = script.read_text()
    assert script.stat().st_mode & 0o111 and len(text.splitlines()) <= 20
    verb = re.search(r'run\("([a-z-]+)"', text)
    assert verb and verb[1] in VERBS


@pytest.mark.parametrize("script", ["pretrain_omega.py", "tools/plan.py"])
def test_outside_the_environment_a_script_says_so(script: str) -> None:
    done = subprocess.run(  # -S: no site-packages
        [sys.executable, "-S", str(ROOT / script)], capture_output=True, text=True, check=False, env={}
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "activate" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_preset_is_found_by_name_and_by_its_path_in_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    presets = shipped.presets()
    assert {"omega-tiny", "omega-11.9b"} <= {*presets}
    assert shipped.located("omega-1b", presets) == shipped.located("examples/omega-1b/run.yaml", presets)
    assert shipped.located("zero1", shipped.deepspeed_settings()).is_file()
    (tmp_path / "omega-1b").write_text("")
    assert shipped.located("omega-1b", presets) == Path("omega-1b")
    assert shipped.located("nothing", presets) == Path("nothing")


def test_a_model_and_a_run_are_named_in_one_way_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for option, verbs in {
        "--checkpoint": ("generate", "fill-mask", "export-hf", "evaluate", "inspect-checkpoint", "train"),
        "--run": ("goodput", "report", "inspect-data", "demo"),
    }.items():
        for verb in verbs:
            with pytest.raises(SystemExit):
                main([verb, "--help"])
            assert f"{option} " in capsys.readouterr().out, verb


def test_a_bare_word_and_its_option_do_not_contradict(tmp_path: Path) -> None:
    parser = CommandLine("x")
    parser.takes_run(positional=True)
    assert parser.parse_args(["a"]).run == parser.parse_args(["--run", "a"]).run == Path("a")
    for words in (["a", "--run", "b"], []):
        with pytest.raises(ConfigError, match="--run"):
            parser.parse_args(words)
