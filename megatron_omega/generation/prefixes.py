"""Beginnings of prompts that were read before: their pages stay, and what begins alike goes on from there.

A beginning is looked for only where the prompt would be cut anyway when it is read: so what is computed for a prompt
does not depend on what was read before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from megatron_omega.generation.cache import Cache, Held

Beginning = tuple[tuple[int, ...], tuple[int, ...]]
"""What the encoder has read, and what the decoder has."""


def cuts(tokens: int, chunk: int, width: int) -> list[int]:
    """Return where the reading of so many tokens is cut: every chunk, and after the last whole page.

    >>> cuts(300, 256, 32), cuts(20, 256, 32)
    ([256, 288, 300], [20])
    """
    ends = {*range(chunk, tokens, chunk), tokens - tokens % width, tokens}
    return sorted(ends - {0})


class Prefixes:
    """The beginnings that are kept; the one that was not used for longest goes first."""

    def __init__(self, cache: Cache, most: int) -> None:
        self._cache, self._most = cache, most
        self._kept: OrderedDict[Beginning, Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, encoder_ids: tuple[int, ...], decoder_ids: tuple[int, ...], ends: Sequence[int]) -> Held | None:
        """Return the longest beginning that is kept, of those that end where the reading is cut."""
        for end in reversed(ends):
            beginning = (encoder_ids, decoder_ids[:end])
            if beginning in self._kept:
                self._kept.move_to_end(beginning)
                return self._kept[beginning]
        return None

    def remember(self, encoder_ids: tuple[int, ...], decoder_ids: tuple[int, ...], held: Held) -> None:
        """Keep what `held` has read, if that is whole pages and there is a slot."""
        beginning = (encoder_ids, decoder_ids[: held.length])
        if held.length % self._cache.width or beginning in self._kept or not self._most:
            return
        if len(self._kept) >= self._most:
            self.forget()
        self._kept[beginning] = self._cache.hold(held.length, held)

    def forget(self) -> bool:
        """Give up the beginning that was not used for longest; return whether there was one."""
        if not self._kept:
            return False
        _, held = self._kept.popitem(last=False)
        self._cache.release(held)
        return True
