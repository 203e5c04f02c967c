"""Where to cut the layer list into pipeline stages, by cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from megatron_omega.accounting.counts import LayerCost

BRIDGE_TOLERANCE = 0.03
"""A cut in front of the bridge is taken when it makes the largest stage at most this much larger."""


def stage_boundaries(
    costs: Sequence[LayerCost],
    num_stages: int,
    *,
    weight: Callable[[LayerCost], float] | None = None,
) -> tuple[int, ...]:
    """Cut the layer list into `num_stages` contiguous stages, the heaviest of which is as light as possible.

    Returns the index of the first layer of stages 1, 2, ... (num_stages - 1 numbers). Equal loads are decided by
    parameters, then by evenness with the lighter stages in front, where 1F1B keeps the most activations. Head and
    output stay together; the cut falls in front of the bridge where that costs at most `BRIDGE_TOLERANCE`, for a
    stage that sends memory and hidden state has two outputs to run its backward pass from. `weight` is the load of
    a layer (default: its forward FLOPs). Interleaved schedules ask for as many stages as they have chunks. Raises
    ValueError when there are fewer layers than stages.
    """
    kinds = [cost.kind for cost in costs]
    last = len(costs) - 1 if "output" in kinds else len(costs)  # output is glued to the head in front of it
    if not 1 <= num_stages <= last:
        raise ValueError(f"{len(costs)} layers cannot be cut into {num_stages} stages; use 1 to {last}")
    loads = [float(weight(cost) if weight else cost.forward_flops) for cost in costs]
    sizes = [float(cost.parameters) for cost in costs]
    if last < len(costs):
        loads[last - 1 :] = [loads[last - 1] + loads[last]]
        sizes[last - 1 :] = [sizes[last - 1] + sizes[last]]
    bridge = kinds.index("bridge") if "bridge" in kinds else None
    return _cut_at_bridge(tuple(loads), tuple(sizes), num_stages, bridge)


@lru_cache(maxsize=512)
def _cut_at_bridge(
    loads: tuple[float, ...],
    sizes: tuple[float, ...],
    num_stages: int,
    bridge: int | None,
) -> tuple[int, ...]:
    free = _cut(loads, sizes, num_stages)
    if bridge is None or num_stages == 1:
        return free
    fewest, most = (
        max(1, num_stages - (len(loads) - bridge)),
        min(bridge, num_stages - 1),
    )
    if fewest > most:
        return free

    def bottleneck(front: int) -> float:
        return max(
            _bottleneck(loads[:bridge], front),
            _bottleneck(loads[bridge:], num_stages - front),
        )

    front = min(range(fewest, most + 1), key=bottleneck)
    if bottleneck(front) > (1 + BRIDGE_TOLERANCE) * _bottleneck(loads, num_stages):
        return free
    encoder = _cut(loads[:bridge], sizes[:bridge], front)
    decoder = _cut(loads[bridge:], sizes[bridge:], num_stages - front)
    return (*encoder, bridge, *(bridge + cut for cut in decoder))


def _earliest_starts(
    loads: Sequence[float], limit: float, sizes: Sequence[float], size_limit: float
) -> list[int] | None:
    """Earliest layer at which the last k stages can begin under both limits, for k = 0, 1, ...; None: never the first.

    Filling stages from the back is optimal: a stage that starts earlier leaves a prefix that is no heavier.
    """
    starts = [len(loads)]
    while starts[-1] > 0:
        start, load, size = starts[-1], 0.0, 0.0
        while start > 0 and load + loads[start - 1] <= limit and size + sizes[start - 1] <= size_limit:
            start -= 1
            load, size = load + loads[start], size + sizes[start]
        if start == starts[-1]:
            return None
        starts.append(start)
    return starts


def _fits(
    loads: Sequence[float],
    limit: float,
    sizes: Sequence[float],
    size_limit: float,
    num_stages: int,
) -> bool:
    starts = _earliest_starts(loads, limit, sizes, size_limit)
    return starts is not None and len(starts) - 1 <= num_stages


def _smallest(values: Sequence[float], fits: Callable[[float], bool]) -> float:
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(values[middle]) else (middle + 1, high)
    return values[low]


def _run_sums(values: Sequence[float]) -> list[float]:
    """Every sum a stage could have, ascending. Sums run from the back, as `_earliest_starts` adds them."""
    sums: set[float] = set()
    for end in range(len(values), 0, -1):
        total = 0.0
        for value in reversed(values[:end]):
            total += value
            sums.add(total)
    return sorted(sums)


@lru_cache(maxsize=4096)
def _bottleneck(loads: tuple[float, ...], num_stages: int) -> float:
    """Load of the heaviest stage of the best cut. Sizes do not count."""
    nothing = [0.0] * len(loads)
    return _smallest(_run_sums(loads), lambda limit: _fits(loads, limit, nothing, 0.0, num_stages))


def _cut(loads: tuple[float, ...], sizes: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    limit = _bottleneck(loads, num_stages)
    size_limit = _smallest(_run_sums(sizes), lambda size: _fits(loads, limit, sizes, size, num_stages))
    starts = _earliest_starts(loads, limit, sizes, size_limit)
    assert starts is not None  # both limits were found feasible
    cuts: list[int] = []
    begin = 0
    for stage in range(num_stages - 1):
        behind = num_stages - 1 - stage
        earliest = max(begin + 1, starts[min(behind, len(starts) - 1)])
        target = sum(loads[begin:]) / (behind + 1)
        end = begin
        load = size = 0.0
        while end < len(loads) - behind:
            within = load + loads[end] <= limit * (1 + 1e-12) and size + sizes[end] <= size_limit * (1 + 1e-12)
            if end >= earliest and (not within or load + loads[end] > target):
                break
            load, size, end = load + loads[end], size + sizes[end], end + 1
        cuts.append(end)
        begin = end
    return tuple(cuts)
