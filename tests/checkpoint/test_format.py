"""The documented way to read a checkpoint, with safetensors and json alone, is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import KINDS, Saved, full_tensors

from megatron_omega.checkpoint import manifest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()


@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (3, 2)])
def test_a_stranger_reads_every_tensor(tmp_path: Path, tensor: int, data: int) -> None:
    path = Saved(tmp_path, tensor, data).write(7)
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)[0], found)
    for name, kinds in full_tensors(7).items():
        for kind in KINDS:
            assert np.array_equal(found["read_tensor"](path, name, kind), kinds[kind].numpy())


def test_every_field_is_documented() -> None:
    records = (
        manifest.Manifest,
        manifest.Shard,
        manifest.FileEntry,
        manifest.Fragment,
        manifest.ParameterEntry,
        manifest.EngineState,
        manifest.SavedLayout,
    )
    for record in records:
        for field in record.model_fields:
            assert re.search(rf"`[^`]*\b{field}\b[^`]*`", DOCUMENT), field
    assert f"`{manifest.VERSION}`" in DOCUMENT
