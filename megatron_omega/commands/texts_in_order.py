"""What many texts become at the same time, in the order of the texts: the first one at once, others when it is over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_omega.generation.requests import Event, Finished


class Told(NamedTuple):
    """An event of one text."""

    prompt: int
    sample: int
    event: Event


def in_order(events: Iterable[Event], prompts: Mapping[int, int], samples: Sequence[int]) -> Iterator[Told]:
    """Yield events prompt by prompt and sample by sample.

    Args:
        prompts: of each request's number, the place of its prompt.
        samples: how many texts each prompt gets.
    """
    places = [(prompt, sample) for prompt, count in enumerate(samples) for sample in range(count)]
    withheld: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    turn = 0
    for event in events:
        place = prompts[event.request], event.sample
        withheld[place].append(event)
        while turn < len(places) and withheld[places[turn]]:
            found = withheld.pop(places[turn])
            yield from (Told(*places[turn], one) for one in found)
            if not isinstance(found[-1], Finished):
                break
            turn += 1
