"""The truth beside a shard: `{prefix}.json` says which tokenizer made it, from what, and how large it must be."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_omega.data.indexed import IndexedShard
from megatron_omega.data.tokenizer import Tokenizer
from megatron_omega.errors import DataError

FORMAT = "megatron-omega shard 1"


@dataclass(frozen=True)
class Sidecar:
    """What a shard says of itself."""

    tokenizer_fingerprint: str
    vocab_size: int
    documents: int
    tokens: int
    dtype: str
    key: str
    options: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT


def sidecar_path(prefix: str | Path) -> Path:
    """Return where the sidecar of shard `prefix` stands."""
    return Path(f"{prefix}.json")


def to_json(sidecar: Sidecar) -> str:
    """Return the content of a sidecar file."""
    return json.dumps(asdict(sidecar), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """Return the sidecar of shard `prefix`; None where there is none (a shard another tool made)."""
    path = sidecar_path(prefix)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r} is unknown")
        return Sidecar(**content)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({error}); make the shard again with megatron-omega preprocess-data"
        ) from None


def check_sidecar(shard: IndexedShard, tokenizer: Tokenizer) -> None:
    """Raise DataError where the sidecar contradicts the shard or the tokenizer. No sidecar, no objection."""
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
