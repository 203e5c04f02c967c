"""The command lines of all verbs: what a user gets wrong is one line that says what to do, like every other mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_omega.errors import ConfigError

COMMAND = "megatron-omega"


def program_name(argv: Sequence[str] | None = None) -> str:
    """Return what the user called: the command with its verb, or a script.

    >>> program_name(["/venv/bin/megatron-omega", "plan", "--help"]), program_name(["plan.py"])
    ('megatron-omega plan', 'plan.py')
    """
    program, *words = sys.argv if argv is None else argv
    name = Path(program).name
    if name not in (COMMAND, "__main__.py"):
        return name
    return " ".join([COMMAND, *words[:1]])


class CommandLine(argparse.ArgumentParser):
    """A parser that raises ConfigError instead of printing its usage."""

    def __init__(self, prog: str | None = None, **settings: Any) -> None:
        super().__init__(prog or program_name(), **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; {self.prog} --help lists the options")
