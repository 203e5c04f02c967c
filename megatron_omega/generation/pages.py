"""Pages: pieces of a preallocated room, given out and taken back. Knows no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class Pages:
    """So many pages, each held by nobody, by one, or by several."""

    def __init__(self, count: int) -> None:
        self._holders = [0] * count
        self._taken = bytearray(count)  # as bytes, since a run of free pages is found by a search for zeros

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return self._taken.count(0)

    @property
    def count(self) -> int:
        """All pages."""
        return len(self._taken)

    def take(self, count: int) -> list[int]:
        """Take `count` free pages: side by side if there is such a run. The caller has made sure that they are free."""
        first = self._taken.find(bytes(count))
        if first >= 0:
            found = list(range(first, first + count))
        else:
            found = [page for page, taken in enumerate(self._taken) if not taken][:count]
        assert len(found) == count, "more pages were taken than are free"
        for page in found:
            self._taken[page] = self._holders[page] = 1
        return found

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages once more."""
        for page in pages:
            assert self._holders[page], "a page that nobody holds cannot be shared"
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """Hold pages once less; those that nobody holds any more are free."""
        for page in pages:
            assert self._holders[page], "a page was dropped that nobody holds"
            self._holders[page] -= 1
            self._taken[page] = self._holders[page] > 0

    def is_shared(self, page: int) -> bool:
        """Return whether several hold `page`."""
        return self._holders[page] > 1
