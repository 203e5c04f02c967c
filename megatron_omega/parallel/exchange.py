"""Agreement between ranks about checkpoints, over a process group of its own so that a background thread may use it.

Values travel as JSON, a few kilobytes at a time; tensors never do. A rank that died makes an exchange raise, at once
where its socket closed, else after the group's timeout: nobody waits for ever.
"""

from __future__ import annotations

from datetime import timedelta

import orjson
import torch
import torch.distributed as dist
from pydantic import JsonValue


class Peers:
    """The ranks of the run. Creating it is collective where torch.distributed is initialised."""

    def __init__(self, *, timeout: timedelta) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, value: JsonValue) -> list[JsonValue]:
        """Return the values of all ranks, in their order. Collective; raises RuntimeError where a rank is gone."""
        if self._group is None:
            return [value]
        mine = torch.frombuffer(bytearray(orjson.dumps(value)), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, padded, group=self._group)
        return [orjson.loads(text[: int(size)].numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]

    def agree(self, value: JsonValue) -> JsonValue:
        """Return the value of the first rank. Collective."""
        return self.exchange(value)[0]
