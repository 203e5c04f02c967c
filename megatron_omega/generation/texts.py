"""Ids become text as they come: no character comes in halves, and nothing comes that may belong to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_omega.data.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class GrowingText:
    """One text, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._unfinished: list[int] = []
        self._withheld = ""
        self.text = ""
        """What has become final."""
        self.is_stopped = False

    def add(self, number: int) -> str:
        """Return what becomes final with the next id."""
        self._unfinished.append(number)
        if len(self._unfinished) == 1:
            found = self._tokenizer.decode_one(number)
        else:
            found = self._tokenizer.decode(self._unfinished)
        if found.endswith(_UNFINISHED):
            return ""
        self._unfinished.clear()
        return self._release(found)

    def end(self) -> str:
        """Return the rest, when no id follows."""
        found = self._tokenizer.decode(self._unfinished)
        self._unfinished.clear()
        part = self._release(found)
        if self.is_stopped:
            return part
        rest, self._withheld = self._withheld, ""
        self.text += rest
        return part + rest

    def _release(self, found: str) -> str:
        """Add `found` to what is withheld; return the part of both that is final."""
        if self.is_stopped:
            return ""
        text = self._withheld + found
        if not self._stop:
            self.text += text
            return text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.is_stopped = bool(places)
        end = min(places) if places else len(text) - self._possible_stop(text)
        self._withheld = "" if places else text[end:]
        self.text += text[:end]
        return text[:end]

    def _possible_stop(self, text: str) -> int:
        """Return how many characters at the end of `text` may begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield text as its ids come. Together they are `tokenizer.decode` of all ids; no character comes in halves."""
    text = GrowingText(tokenizer)
    for number in ids:
        if part := text.add(number):
            yield part
    if rest := text.end():
        yield rest
