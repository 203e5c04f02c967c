"""The command lines of all verbs: what a user gets wrong is one line that says what to do, like every other mistake."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from megatron_omega.errors import ConfigError
from megatron_omega.host.regular_files import require_writable_name

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


def output_file(text: str) -> Path:
    """Return the path of a file that an option names for writing; for `add_argument(type=...)`.

    Raises ArgumentTypeError, before any work is done, if something else is there: a folder, a pipe, a device.
    """
    path = Path(text)
    try:
        require_writable_name(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} {error.strerror}; give the name of a file to write") from None
    return path


def output_folder(text: str) -> Path:
    """Return the path of a folder that an option names for writing; for `add_argument(type=...)`.

    Raises ArgumentTypeError, before any work is done, if it is no folder and cannot become one.
    """
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is no folder; give the name of a folder to write to")
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folders above `path` and let it be written. Raises ConfigError instead of OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; free space or choose another place") from None


class CommandLine(argparse.ArgumentParser):
    """A parser that raises ConfigError instead of printing its usage."""

    def __init__(self, prog: str | None = None, **settings: Any) -> None:
        super().__init__(prog or program_name(), **settings)
        self._bare: dict[str, tuple[str, bool]] = {}

    def takes_checkpoint(self, *, positional: bool = False, required: bool = True) -> None:
        """Add --checkpoint, the one way to name a model; with `positional` also as a bare word."""
        self._takes(
            "checkpoint", "a run folder, its checkpoints, one step-... folder, or an export", positional, required
        )

    def takes_run(self, *, positional: bool = False, required: bool = True) -> None:
        """Add --run, the one way to name a run; with `positional` also as a bare word."""
        self._takes("run", "folder of a run", positional, required)

    def _takes(self, name: str, meaning: str, positional: bool, required: bool) -> None:
        option = self.add_argument(f"--{name}", type=Path, required=required and not positional, help=meaning)
        if positional:
            self.add_argument(
                f"bare_{name}", type=Path, nargs="?", metavar=name.upper(), help=f"short for --{name} {name.upper()}"
            )
            self._bare[name] = (option.dest, required)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; what was given as a bare word counts as its option."""
        self._require_text(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(args, namespace)
        for name, (dest, required) in self._bare.items():
            bare = vars(found).pop(f"bare_{name}")
            if bare is not None and getattr(found, dest) is not None:
                self.error(f"{bare} and --{name} {getattr(found, dest)} both name a {name}; give one")
            setattr(found, dest, getattr(found, dest) or bare)
            if required and getattr(found, dest) is None:
                self.error(f"--{name} is missing")
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; {self.prog} --help lists the options")

    def _require_text(self, words: Sequence[str]) -> None:
        for word in words:
            shown = word.encode(errors="backslashreplace").decode()
            if shown != word:
                self.error(f"{shown} is not text in UTF-8")
