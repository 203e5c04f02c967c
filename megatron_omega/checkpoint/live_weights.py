"""The weights of a live engine as whole tensors, one at a time, on every rank: what a checkpoint of it would hold.

Every element is held by one rank; the others add nothing to it. No file is written, and no more than one tensor is
whole at a time.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.checkpoint.live_state import Binding
from megatron_omega.parallel.regions import Region, copy_overlap, whole


class LiveWeights:
    """What is trained, fp32, by canonical name."""

    def __init__(self, binding: Binding, device: torch.device) -> None:
        self._shapes, self._device = binding.shapes, device
        self._mine: dict[str, list[tuple[Region, Tensor]]] = defaultdict(list)
        for duty in binding.duties:
            held = binding.holdings[duty.holding]
            values = held.part(held.flat).narrow(0, duty.offset, duty.count)
            self._mine[held.info.name].append((held.holding.region.part(duty.offset, duty.count), values))

    def names(self) -> tuple[str, ...]:
        """Return the canonical names of all that is trained."""
        return tuple(self._shapes)

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor, in its global shape. Collective: every rank asks for the same one."""
        region = whole(self._shapes[name])
        values = torch.zeros(region.count, device=self._device)
        for mine, held in self._mine.get(name, ()):
            copy_overlap(held.to(self._device), mine, values, region)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
        return values.view(region.box_shape)
