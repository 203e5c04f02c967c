"""Print the test files of what was changed since a commit (default: the last one), for `make check`.

A changed file of the package selects the tests of its room, a changed test itself; anything else selects nothing. The
architecture test always runs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = "tests/test_architecture.py"


def changed(since: str) -> list[str]:
    """Return the files that differ from `since`, those that git does not track yet among them."""
    commands = (["git", "diff", "--name-only", since], ["git", "ls-files", "--others", "--exclude-standard"])
    return [
        name
        for command in commands
        for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ]


def affected(files: Iterable[str]) -> list[str]:
    """Return the test files and folders to run, in order."""
    found = {ALWAYS}
    for name in files:
        parts = Path(name).parts
        if parts[0] == "tests" and Path(name).name.startswith("test_") and (ROOT / name).exists():
            found.add(name)
        elif parts[0] == "megatron_omega" and len(parts) > 2 and (ROOT / "tests" / parts[1]).is_dir():
            found.add(f"tests/{parts[1]}")
    return sorted(found)


if __name__ == "__main__":
    print(*affected(changed(sys.argv[1] if len(sys.argv) > 1 else "HEAD")))
