"""A shard's metadata: `{prefix}.json` says which tokenizer made it, from what, and how large it must be.

Its first line holds a checksum of all that follows, as a checkpoint's manifest has. Files of format 1 had none; they
are read as they are.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError
from megatron_omega.host.regular_files import read_regular

FORMAT = "megatron-omega shard 2"
_FIRST_LINE = re.compile(rb'\{"checksum": "[0-9a-f]{16}",\n')


Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass(frozen=True)
class Sidecar:
    """What a shard says of itself."""

    tokenizer_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    vocab_size: Count
    documents: Count
    tokens: Count
    dtype: str
    key: str
    options: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    format: Literal["megatron-omega shard 1", "megatron-omega shard 2"] = FORMAT

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


_TYPES = TypeAdapter(Sidecar)


def sidecar_path(prefix: str | Path) -> Path:
    """Return where the sidecar of shard `prefix` stands."""
    return Path(f"{prefix}.json")


def to_json(sidecar: Sidecar) -> str:
    """Return the content of a sidecar file."""
    values = asdict(replace(sidecar, format=FORMAT))
    rest = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False).removeprefix("{\n") + "\n"
    return _first_line(rest.encode()).decode() + rest


def _first_line(rest: bytes) -> bytes:
    return b'{"checksum": "%s",\n' % xxhash.xxh3_64_hexdigest(rest).encode()


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """Return the sidecar of shard `prefix`; None if there is none (a shard another tool made)."""
    path = sidecar_path(prefix)
    if not path.exists():
        return None
    try:
        return _checked(read_regular(path))
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"]))
        reason = f"{field_name}: {first['msg']}" if field_name else first["msg"]
    except OSError as error:
        reason = str(error.strerror)
    except ValueError as error:
        reason = str(error)
    raise DataError(f"{path} is damaged ({reason}); make the shard again with megatron-omega preprocess-data")


def _checked(data: bytes) -> Sidecar:
    """Return what a file says; raise ValueError if a byte of it has changed."""
    if not _FIRST_LINE.match(data):
        sidecar = _TYPES.validate_json(data)
        if sidecar.format == FORMAT:
            raise ValueError("it has no checksum")
        return sidecar
    end = data.index(b"\n") + 1
    if data[:end] != _first_line(data[end:]):
        raise ValueError("its checksum does not match")
    return _TYPES.validate_json(b"{" + data[end:])


def check_sidecar(shard: IndexedShard, tokenizer: Tokenizer) -> None:
    """Raise DataError if the sidecar contradicts the shard or the tokenizer. No sidecar, no objection."""
    sidecar = read_sidecar(shard.prefix)
    if sidecar is None:
        return
    if sidecar.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"shard {shard.prefix} was made with tokenizer {sidecar.tokenizer_fingerprint[:12]} "
            f"({sidecar.options.get('tokenizer_model', 'unknown path')}), tokenizer {tokenizer.path} is "
            f"{tokenizer.fingerprint[:12]}; use the tokenizer of the shard or preprocess again"
        )
    found = (len(shard), shard.num_tokens, shard.dtype.name)
    if found != (sidecar.documents, sidecar.tokens, sidecar.dtype):
        raise DataError(
            f"shard {shard.prefix} has {found[0]} documents, {found[1]} tokens of {found[2]}; its sidecar promises "
            f"{sidecar.documents}, {sidecar.tokens} of {sidecar.dtype}; the shard is damaged, make it again"
        )
