"""A corpus of many shards: a pattern or a list in the place of one prefix, spread out before anything else reads it.

    corpora: [{prefix: "data/web-*_text_document", weight: 3}, {prefix: [data/code_a, data/code_b]}]

Each shard becomes an entry of its own, whose part of the weight is its part of the text, so that every document is as
likely as with one large shard. What a run writes down are the entries: it goes on from them whatever is added later.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Values = dict[str, Any]


def spread_corpora(values: Values) -> Values:
    """Return the values of a configuration with one entry of data.corpora for each shard."""
    data = values.get("data")
    corpora = data.get("corpora") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(corpora, list | tuple):
        return values
    return {**values, "data": {**data, "corpora": [entry for corpus in corpora for entry in _entries(corpus)]}}


def _entries(corpus: Any) -> Iterator[Any]:
    """Yield the entries of one corpus; itself where it is one shard, or nothing that can be read."""
    given = corpus.get("prefix") if isinstance(corpus, Mapping) else None
    prefixes = _shards(given)
    weight = corpus.get("weight", 1.0) if isinstance(corpus, Mapping) else None
    if not prefixes or not isinstance(weight, int | float) or isinstance(weight, bool):
        yield corpus
        return
    sizes = [_size(prefix) for prefix in prefixes]
    total = sum(sizes)
    for prefix, size in zip(prefixes, sizes, strict=True):
        yield {**corpus, "prefix": prefix, "weight": weight * size / total if total else weight / len(prefixes)}


def _shards(given: Any) -> list[str]:
    """Return the shards of a pattern or a list, in the order of their names and of the list; nothing for one prefix."""
    if isinstance(given, list | tuple):
        return [prefix for one in given if isinstance(one, str) for prefix in _shards(one) or [one]]
    if not isinstance(given, str) or not glob.has_magic(given) or Path(f"{given}.idx").exists():
        return []
    return sorted(path.removesuffix(".idx") for path in glob.glob(f"{given}.idx"))  # noqa: PTH207 - a pattern may stand in any part


def _size(prefix: str) -> int:
    try:
        return Path(f"{prefix}.bin").stat().st_size
    except OSError:
        return 0
