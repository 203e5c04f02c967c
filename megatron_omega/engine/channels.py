"""Messages between neighbouring pipeline ranks: receives posted early, sends held until done, one group a direction.

A channel is a pair (sender, receiver) of pipeline ranks, with a process group that it shares with the same pair of
other pipelines: on a GPU its messages travel on a stream of their own, behind computation and behind everything else
that ranks say to each other. A message is a tuple of tensors. The first of a kind is preceded by its shapes. What
arrives is taken in the order in which it is sent, and that order is known beforehand. Knows nothing of models or
schedules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.parallel.topology import new_group

Tensors = tuple[Tensor, ...]
Form = tuple[tuple[torch.dtype, tuple[int, ...]], ...]
"""Number format and shape of each tensor of a message."""

_FORM_NUMBERS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


def form_of(tensors: Sequence[Tensor]) -> Form:
    return tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)


@dataclass(frozen=True)
class Pair:
    """A direction between two pipeline ranks."""

    sender: int
    receiver: int


def neighbours(ranks: int, *, is_ring: bool) -> list[Pair]:
    """Return every direction in which neighbours among pipeline ranks talk, in one order for all.

    `is_ring`: the last and the first are neighbours, too.

    >>> [(pair.sender, pair.receiver) for pair in neighbours(3, is_ring=False)]
    [(0, 1), (1, 0), (1, 2), (2, 1)]
    """
    steps = [(rank, (rank + 1) % ranks) for rank in range(ranks if is_ring else ranks - 1)]
    return [Pair(*ends) for ends in sorted({*steps, *((b, a) for a, b in steps)}) if ends[0] != ends[1]]


@dataclass
class _Arrival:
    tensors: Tensors
    works: list[dist.Work]


@dataclass
class _Departure:
    tensors: Tensors
    works: list[dist.Work]
    consumed_at: int
    """Place of the pass that takes it in, among the receiver's passes."""


@dataclass
class _Inbox:
    """What one neighbour sends, in its order."""

    expected: deque[tuple[Hashable, Hashable]] = field(default_factory=deque)
    """(message, kind) not yet posted."""
    posted: dict[Hashable, _Arrival] = field(default_factory=dict)


class Channels:
    """This rank's channels to its neighbours. Collective: every rank makes one, with the same pipelines."""

    def __init__(
        self,
        pipelines: Sequence[Sequence[int]],
        device: torch.device,
        *,
        is_ring: bool = True,
        timeout: timedelta | None = None,
    ) -> None:
        """`pipelines` are the global ranks of every pipeline, stage by stage; `is_ring`: see `neighbours`.

        `timeout` is how long a message may take.
        """
        self.ranks = next(ranks for ranks in pipelines if dist.get_rank() in ranks)
        self.rank, self.device = self.ranks.index(dist.get_rank()), device
        self._groups: dict[Pair, dist.ProcessGroup] = {}
        for pair in neighbours(len(self.ranks), is_ring=is_ring):
            # All pipelines share it, or there would be thousands, each a meeting of all ranks.
            members = sorted(ranks[end] for ranks in pipelines for end in (pair.sender, pair.receiver))
            group = new_group(members, timeout)
            if self.rank in (pair.sender, pair.receiver):
                self._groups[pair] = group
        mine = list(self._groups)
        for pair in mine:
            self._greet(pair)
        self._inboxes = {pair.sender: _Inbox() for pair in mine if pair.receiver == self.rank}
        self._sent: dict[int, deque[_Departure]] = {pair.receiver: deque() for pair in mine if pair.sender == self.rank}
        self._forms: dict[Hashable, Form] = {}

    def _greet(self, pair: Pair) -> None:
        """Let all members meet, and say one word: what is first made in the middle of a step would wait there."""
        word = torch.zeros(1, device=self.device)
        dist.all_reduce(word, group=self._groups[pair])
        if self.rank == pair.sender:
            dist.send(word, self.ranks[pair.receiver], group=self._groups[pair])
        else:
            dist.recv(word, self.ranks[pair.sender], group=self._groups[pair])

    def expect(self, sender: int, messages: Sequence[tuple[Hashable, Hashable]]) -> None:
        """Say what `sender` will send: (message, kind) in its order."""
        self._inboxes[sender].expected.extend(messages)

    def know(self, kind: Hashable, form: Form) -> None:
        """Say what messages of `kind` look like, where both sides know without a word."""
        self._forms.setdefault(kind, form)

    def send(self, receiver: int, kind: Hashable, tensors: Tensors, consumed_at: int) -> None:
        """Start to send; the tensors are kept until `release`."""
        if kind not in self._forms:
            self._forms[kind] = form_of(tensors)
            self._depart(receiver, (_written(self._forms[kind], self.device),), consumed_at)
        assert form_of(tensors) == self._forms[kind], f"{kind}: {form_of(tensors)}, before {self._forms[kind]}"
        self._depart(receiver, tuple(tensor.contiguous() for tensor in tensors), consumed_at)

    def post(self, sender: int, message: Hashable) -> None:
        """Start to receive `message`, and before it what is sent before it; nothing if a form is still unknown."""
        inbox = self._inboxes[sender]
        while message not in inbox.posted and inbox.expected and inbox.expected[0][1] in self._forms:
            self._receive_next(sender)

    def take(self, sender: int, message: Hashable) -> Tensors:
        """Return `message` when it has arrived."""
        inbox = self._inboxes[sender]
        while message not in inbox.posted:
            kind = inbox.expected[0][1]
            if kind not in self._forms:
                word = torch.empty(_FORM_NUMBERS, dtype=torch.int64, device=self.device)
                dist.recv(word, self.ranks[sender], group=self._groups[Pair(sender, self.rank)])
                self._forms[kind] = _read(word)
            self._receive_next(sender)
        arrival = inbox.posted.pop(message)
        for work in arrival.works:
            work.wait()
        return arrival.tensors

    def release(self, receiver: int, reached: int) -> None:
        """Let go of what `receiver` took in at its passes up to `reached`: done already, so this waits for nothing."""
        sent = self._sent[receiver]
        while sent and sent[0].consumed_at <= reached:
            _finish(sent.popleft())

    def keep_at_most(self, receiver: int, count: int) -> None:
        """Wait until at most `count` messages to `receiver` are on their way."""
        while len(self._sent[receiver]) > count:
            _finish(self._sent[receiver].popleft())

    def finish(self) -> None:
        """Wait for everything that was sent."""
        assert not any(inbox.expected or inbox.posted for inbox in self._inboxes.values()), "messages were not taken"
        for receiver in self._sent:
            self.keep_at_most(receiver, 0)

    def _depart(self, receiver: int, tensors: Tensors, consumed_at: int) -> None:
        works = self._post(dist.isend, tensors, receiver)
        self._sent[receiver].append(_Departure(tensors, works, consumed_at))

    def _receive_next(self, sender: int) -> None:
        inbox = self._inboxes[sender]
        message, kind = inbox.expected.popleft()
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self.device) for dtype, shape in self._forms[kind])
        inbox.posted[message] = _Arrival(tensors, self._post(dist.irecv, tensors, sender))

    def _post(self, how: object, tensors: Tensors, peer: int) -> list[dist.Work]:
        """Start the transfers of one message as one launch."""
        pair = Pair(self.rank, peer) if how is dist.isend else Pair(peer, self.rank)
        group, address = self._groups[pair], self.ranks[peer]
        return dist.batch_isend_irecv([dist.P2POp(how, tensor, address, group) for tensor in tensors])  # pyright: ignore[reportArgumentType]


def _finish(departure: _Departure) -> None:
    for work in departure.works:
        work.wait()


def _written(form: Form, device: torch.device) -> Tensor:
    numbers = [len(form)]
    for dtype, shape in form:
        numbers += [_DTYPES.index(dtype), len(shape), *shape]
    assert len(numbers) <= _FORM_NUMBERS, f"a message of {len(form)} tensors is too long to describe"
    return torch.tensor(numbers + [0] * (_FORM_NUMBERS - len(numbers)), dtype=torch.int64, device=device)


def _read(word: Tensor) -> Form:
    numbers = iter(word.tolist())
    form = []
    for _ in range(next(numbers)):
        dtype, dims = _DTYPES[next(numbers)], next(numbers)
        form.append((dtype, tuple(next(numbers) for _ in range(dims))))
    return tuple(form)
