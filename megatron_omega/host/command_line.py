"""The command lines of all tools: what a user gets wrong is one line that says what to do, like every other mistake."""

from __future__ import annotations

import argparse
from typing import NoReturn

from megatron_omega.errors import ConfigError


class CommandLine(argparse.ArgumentParser):
    """A parser that raises ConfigError instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; {self.prog} --help lists the options")
