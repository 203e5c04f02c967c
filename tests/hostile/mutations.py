"""Changes that make a file hostile: of its bytes, and of the values of its JSON."""

from __future__ import annotations

import json
import random
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, -0.5, "", "x", "\0", "../../etc/passwd", "/dev/zero", "\ud800", [], {},
    [[]], [None] * 3, {"": {}}, "9" * 5000,
)  # fmt: skip


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Return other bytes: some changed, cut, doubled, moved or put in."""
    place = chance.randrange(len(data) + 1)
    stop = min(len(data), place + chance.choice((1, 4, 8, 100)))
    new = chance.choice((
        lambda: data[:place] + bytes([(data[place] if place < len(data) else 0) ^ chance.randrange(1, 256)]) + data[place + 1 :],
        lambda: data[:place] + chance.randbytes(stop - place) + data[stop:],
        lambda: data[:place] + bytes([chance.choice((0, 255))]) * (stop - place) + data[stop:],
        lambda: data[:place],
        lambda: data[:place] + data[stop:],
        lambda: data[:place] + chance.randbytes(8) + data[place:],
        lambda: data + data[place:stop],
    ))()  # fmt: skip
    return new if new != data else data + b"\0"


def mutate_json(text: str, chance: random.Random) -> str:
    """Return other JSON: one to three values replaced, taken out or added."""
    value = json.loads(text)
    for _ in range(chance.randint(1, 3)):
        value = _mutated(value, chance)
    return json.dumps(value)


def _mutated(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        changed = dict(value) if isinstance(value, dict) else list(value)
        if chance.random() < 0.1:
            del changed[key]
        elif isinstance(changed, dict) and chance.random() < 0.05:
            changed["strange"] = chance.choice(STRANGE)
        else:
            changed[key] = _mutated(value[key], chance)
        return changed
    return chance.choice(STRANGE)
