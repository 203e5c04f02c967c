"""No argument that names a file lets a verb wait, fill its memory, or end with a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostile.arguments import READ, WRITTEN, mistaken_arguments, unlisted
from hostile.attacks import write_targets
from hostile.test_quick import ends

HEAVY = (
    "evaluate",
    "serve",
    "import-hf",
    "check-device",
    "export-hf",
    "sweep",
    "verify-parallel",
    "report",
    "score",
    "train --logging",
    "dry-run",
)
"""Verbs that import torch for a second or more; `make hostile` has them."""


def test_every_argument_is_listed() -> None:
    assert unlisted() == set(), "give each a line in hostile.arguments: READ or WRITTEN"


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(("lines", "kind"), [(READ, "pipe"), (READ, "sparse"), (WRITTEN, "device")])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, lines: tuple[str, ...], kind: str) -> None:
    write_targets(tmp_path / "good")
    (tmp_path / "work").mkdir()
    quick = [line for line in lines if not line.startswith(HEAVY)]
    assert ends(list(mistaken_arguments(tmp_path / "work", tmp_path / "good", quick, [kind]))) == []
