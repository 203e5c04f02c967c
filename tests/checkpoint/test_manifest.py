"""The manifest is believed only where it proves itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import Saved

from megatron_omega.checkpoint.manifest import FILE_NAME, encode_manifest, read_manifest
from megatron_omega.checkpoint.tensor_file import checksum
from megatron_omega.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Saved(tmp_path_factory.mktemp("run")).write(3)


def forge(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write a manifest whose checksum is right."""
    rest = json.dumps({key: value for key, value in manifest.items() if key != "checksum"}).encode()[1:]
    (folder / FILE_NAME).write_bytes(b'{"checksum": "%s",\n' % checksum(rest).encode() + rest)
    return folder


def load(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / FILE_NAME).read_text())


def test_it_survives_being_written_and_read(checkpoint: Path, tmp_path: Path) -> None:
    manifest = read_manifest(checkpoint)
    (tmp_path / FILE_NAME).write_bytes(encode_manifest(manifest))
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(forge(tmp_path, load(checkpoint))) == manifest


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(checkpoint: Path, tmp_path: Path, position: float, bit: int) -> None:
    data = bytearray((checkpoint / FILE_NAME).read_bytes())
    data[int(position * len(data))] ^= 1 << bit
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True))
def test_every_truncation_is_refused(checkpoint: Path, tmp_path: Path, position: float) -> None:
    data = (checkpoint / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(data[: int(position * len(data))])
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../weights-00000.safetensors",
        "/etc/passwd",
        "a/weights-00000.safetensors",
        "weights-00000.safetensors/..",
        "",
        ".",
        "weights-00000.safetensors\n",
        "weights-00000.safetensors\0",
        "weights-٠٠٠٠٠.safetensors",
    ],
)
def test_no_name_leads_out_of_the_folder(checkpoint: Path, tmp_path: Path, name: str) -> None:
    manifest = load(checkpoint)
    manifest["shards"][0]["weights"]["name"] = name
    with pytest.raises(CheckpointError, match="name"):
        read_manifest(forge(tmp_path, manifest))


def change(path: str, value: Any) -> Any:
    def apply(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        *parents, last = path.split("/")
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        if value is ...:
            del target[int(last) if isinstance(target, list) else last]
        else:
            target[int(last) if isinstance(target, list) else last] = value

    return apply


NORM = "parameters/decoder.0.norm.weight"
TABLE = "parameters/token_table.weight"
LIES = {
    "another format": change("format", "pickle"),
    "a later version": change("version", 2),
    "an unknown field": change("surprise", 1),
    "no shards": change("shards", []),
    "a fragment less": change(f"{TABLE}/fragments/0", ...),
    "a shard that is not there": change(f"{TABLE}/fragments/0/shard", 9),
    "a negative range": change(f"{TABLE}/fragments/0/range", [-4, 2]),
    "an empty range": change(f"{TABLE}/fragments/0/range", [2, 2]),
    "a range beyond the slice": change(f"{TABLE}/fragments/0/range", [0, 10**15]),
    "a slice beyond the tensor": change(f"{TABLE}/fragments/0/slice", [0, 10**15]),
    "a slice of an unsharded tensor": change(f"{NORM}/fragments/0/slice", [0, 1]),
    "a larger tensor": change(f"{NORM}/shape", [10**12]),
    "an axis that is not there": change(f"{TABLE}/axis", 5),
    "a block less": change(f"{TABLE}/fragments/0/blocks/weight", []),
    "a kind less": change(f"{TABLE}/fragments/0/blocks/exp_avg", ...),
    "a file twice": change("shards/1/weights/name", "weights-00000.safetensors"),
    "text for a number": change("step", "3"),
    "a fraction for a count": change("step", 3.5),
    "blocks of no size": change("block_bytes", 0),
    "a checksum that is none": change(f"{TABLE}/fragments/0/blocks/weight/0", "XYZ"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_what_contradicts_itself_is_refused(checkpoint: Path, tmp_path: Path, lie: str) -> None:
    manifest = load(checkpoint)
    LIES[lie](manifest)
    with pytest.raises(CheckpointError):
        read_manifest(forge(tmp_path, manifest))


def test_a_deeply_nested_manifest_is_refused(tmp_path: Path) -> None:
    rest = b'"state": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / FILE_NAME).write_bytes(b'{"checksum": "%s",\n' % checksum(rest).encode() + rest)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without its manifest"):
        read_manifest(tmp_path)


def test_a_manifest_that_is_a_link_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).symlink_to(checkpoint / FILE_NAME)
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path)
