"""Process groups of one host: sums, gathers and transfers pass through memory that its ranks share, not through gloo.

gloo copies each message into the kernel and out of it again, by a thread of its own, wherever the receiver is. Between
ranks of one host that costs several times what the sum itself does. Sums add in the order of ranks, so that all get
the same bits. Broadcasts, barriers and other rare calls stay with gloo. `parallel/slots.py` has the memory itself.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_omega.parallel.slots import SLOT, Mesh, Need, connect

BACKEND = "shared_memory"
SUMMED_BY_ALL = 3
"""Ranks up to which each sums everything itself. More share the work, and gather what the others have summed."""

Combine = Callable[..., Tensor]
_COMBINE: dict[Any, Combine] = {
    dist.ReduceOp.SUM: torch.add, dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum,
}  # fmt: skip


class Message(dist.Work):
    """Something that has been started."""

    is_done = False

    def finish(self) -> None:
        """Return when the tensors hold what they are to hold. Waits as long as the group does."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Finish. Every wait goes through this."""
        self.finish()
        return True

    def is_completed(self) -> bool:
        return self.is_done


class Departure(Message):
    """What was sent: it lies where the receiver finds it."""

    is_done = True


class Arrival(Message):
    """What is to come from one rank."""

    def __init__(self, group: SharedMemoryGroup, tensor: Tensor, rank: int, tag: int) -> None:
        super().__init__()
        self.tensor, self.rank, self.tag = tensor, rank, tag
        self._group = group

    def finish(self) -> None:
        self._group.take(self)


class Collective(Message):
    """What all take part in."""

    def __init__(self, group: SharedMemoryGroup, steps: Iterator[Need]) -> None:
        super().__init__()
        self._group, self._steps = group, steps
        self._need: Need | None = None

    def finish(self) -> None:
        self._group.finish(self)

    def advance(self, mesh: Mesh, *, waits: bool) -> bool:
        """Go on as far as the others are, or to the end; return whether that was reached."""
        while not self.is_done:
            self._need = self._need or next(self._steps, None)
            mesh.tell()
            if self._need is None:
                self.is_done = True
            elif mesh.reached(self._need, waits=waits):
                self._need = None
            else:
                break
        return self.is_done


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group whose sums, gathers and transfers pass through shared memory.

    Collectives go on while a rank calls the group, in the order in which they were started. Raises RuntimeError where
    a rank is gone or does not come, and at every call after that.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, mesh: Mesh) -> None:
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, self._gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._mesh, self._has_ended = mesh, False
        self._started: deque[Collective] = deque()
        self._expected: dict[tuple[int, int], deque[Arrival]] = defaultdict(deque)
        """Arrivals by sender and tag, in the order in which they were asked for, which is that of the messages."""

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        """Reduce each of `tensors` in place."""
        opts = opts or dist.AllreduceOptions()
        combine = _COMBINE.get(opts.reduceOp.op)
        if combine is None:
            return self._gloo.allreduce(tensors, opts)
        return self._start([_all_reduce(self._mesh, tensor, combine) for tensor in tensors], opts)

    allreduce_coalesced = allreduce

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """Copy each rank's input into its place in `outputs`."""
        return self._gather(outputs, inputs, opts)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:  # noqa: A002 - torch's name
        """Copy each rank's input into its part of `output`."""
        return self._gather([self._parts(output)], [input], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Copy each rank's inputs into their parts of `outputs`."""
        return self._gather([self._parts(output) for output in outputs], inputs, opts)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        """Reduce to each rank its one of the inputs."""
        return self._scatter(outputs, inputs, opts)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:  # noqa: A002 - torch's name
        """Reduce to each rank its part of `input`."""
        return self._scatter([output], [self._parts(input)], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        """Reduce to each rank its parts of `inputs`."""
        return self._scatter(outputs, [self._parts(whole) for whole in inputs], opts)

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        """Send one tensor to `rank` of the group."""
        [tensor] = tensors
        with self._ending_with_failures():
            has_room = self._mesh.send(tensor.data.reshape(-1), rank, tag)
        return Departure() if has_room else self._gloo.send(tensors, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        """Receive one tensor from `rank` of the group."""
        [tensor] = tensors
        arrival = Arrival(self, tensor, rank, tag)
        self._expected[rank, tag].append(arrival)
        return arrival

    def recv_anysource(self, tensors: list[Tensor], tag: int) -> Any:
        raise NotImplementedError("this process group receives from a rank that is named")

    # What torch would look for in Python it must find there: it calls its own with the interpreter locked, and gloo's
    # thread, which lets go of tensors, would wait for that lock.

    def broadcast(self, *arguments: Any) -> Any:
        return self._gloo.broadcast(*arguments)

    def barrier(self, *arguments: Any) -> Any:
        return self._gloo.barrier(*arguments)

    def all_to_all_single(self, *arguments: Any) -> Any:
        return self._gloo.alltoall_base(*arguments)

    def getBackendName(self) -> str:  # noqa: N802 - torch's
        return BACKEND

    def shutdown(self) -> None:
        """Leave the group."""
        self._break()
        super().shutdown()

    def finish(self, collective: Collective) -> None:
        """Go on until `collective` is done."""
        while not collective.is_done:
            self._go_on(waits=True)

    def take(self, arrival: Arrival) -> None:
        """Take what was sent until `arrival` is there."""
        expected = self._expected[arrival.rank, arrival.tag]
        while not arrival.is_done:
            first = expected[0]
            flat = first.tensor.data.reshape(-1)
            with self._ending_with_failures():
                is_here = self._mesh.receive(flat, first.rank, first.tag)
            if is_here:
                _give(flat, first.tensor)
            else:
                self._gloo.recv([first.tensor], first.rank, first.tag).wait()
            expected.popleft().is_done = True

    def _parts(self, whole: Tensor) -> list[Tensor]:
        if not whole.is_contiguous():
            raise ValueError("tensors that have a part for each rank must be contiguous")
        return [*whole.data.view(-1).chunk(self.size())]

    def _gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return self._start([_all_gather(self._mesh, parts, own) for parts, own in pairs], opts)

    def _scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        combine = _COMBINE.get(opts.reduceOp.op)
        if combine is None:
            return self._gloo.reduce_scatter(outputs, inputs, opts)
        pairs = zip(outputs, inputs, strict=True)
        return self._start([_reduce_scatter(self._mesh, own, parts, combine) for own, parts in pairs], opts)

    def _start(self, parts: Sequence[Iterator[Need]], opts: Any) -> Collective:
        """Start what is waited for later; the rest begins where it is waited for, which is at once."""
        collective = Collective(self, chain(*parts))
        self._started.append(collective)
        if getattr(opts, "asyncOp", False):
            self._go_on(waits=False)
        return collective

    def _go_on(self, *, waits: bool) -> None:
        """Go on with the first that was started, and where it ends with the next ones."""
        with self._ending_with_failures():
            while self._started and self._started[0].advance(self._mesh, waits=waits):
                self._started.popleft()
                waits = False

    @contextmanager
    def _ending_with_failures(self) -> Iterator[None]:
        """What fails once is over: the others would take one message for another."""
        if self._has_ended:
            raise RuntimeError("connection closed: this process group has ended")
        try:
            yield
        except BaseException:
            self._break()
            raise

    def _break(self) -> None:
        self._has_ended = True
        self._started.clear()
        self._mesh.close()


def register() -> None:
    """Let torch.distributed know the backend; groups whose ranks are on several hosts become gloo's."""
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    mesh = connect(store, rank, size, timeout)
    if mesh is None:
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    return SharedMemoryGroup(store, rank, size, timeout, mesh)


def _lengths(total: int, most: int) -> list[int]:
    return [min(most, total - begin) for begin in range(0, total, most)]


def _all_reduce(mesh: Mesh, tensor: Tensor, combine: Combine) -> Iterator[Need]:
    flat = tensor.data.reshape(-1)
    pieces = flat.split(SLOT // flat.itemsize) if flat.numel() else ()
    lengths = [piece.numel() for piece in pieces]

    def put(index: int, slot: Tensor) -> None:
        slot.copy_(pieces[index])

    def sum_all(index: int, slots: list[Tensor]) -> None:
        _combine(slots, pieces[index], combine)

    def share(piece: Tensor, rank: int) -> Tensor:
        return piece.tensor_split(mesh.size)[rank]

    def sum_share(index: int, slots: list[Tensor]) -> None:
        _combine([share(slot, mesh.rank) for slot in slots], share(pieces[index], mesh.rank), combine)

    def put_share(index: int, slot: Tensor) -> None:
        share(slot, mesh.rank).copy_(share(pieces[index], mesh.rank))

    def take_shares(index: int, slots: list[Tensor]) -> None:
        for rank, slot in enumerate(slots):
            if rank != mesh.rank:
                share(pieces[index], rank).copy_(share(slot, rank))

    if mesh.size <= SUMMED_BY_ALL:
        yield from mesh.pieces(lengths, flat.dtype, put, sum_all)
    else:
        yield from mesh.pieces(lengths, flat.dtype, put, sum_share)
        yield from mesh.pieces(lengths, flat.dtype, put_share, take_shares)
    _give(flat, tensor)


def _all_gather(mesh: Mesh, outputs: Sequence[Tensor], own: Tensor) -> Iterator[Need]:
    mine, flats = own.data.reshape(-1), [output.data.reshape(-1) for output in outputs]
    most = SLOT // mine.itemsize

    def put(index: int, slot: Tensor) -> None:
        slot.copy_(mine[index * most :][: slot.numel()])

    def take(index: int, slots: list[Tensor]) -> None:
        for flat, slot in zip(flats, slots, strict=True):
            flat[index * most :][: slot.numel()].copy_(slot)

    yield from mesh.pieces(_lengths(mine.numel(), most), mine.dtype, put, take)
    for flat, output in zip(flats, outputs, strict=True):
        _give(flat, output)


def _reduce_scatter(mesh: Mesh, own: Tensor, inputs: Sequence[Tensor], combine: Combine) -> Iterator[Need]:
    mine, flats = own.data.reshape(-1), [part.data.reshape(-1) for part in inputs]
    most = SLOT // mine.itemsize // mesh.size
    lengths = _lengths(mine.numel(), most)

    def put(index: int, slot: Tensor) -> None:
        for flat, place in zip(flats, slot.chunk(mesh.size), strict=True):
            place.copy_(flat[index * most :][: place.numel()])

    def take(index: int, slots: list[Tensor]) -> None:
        parts = [slot.chunk(mesh.size)[mesh.rank] for slot in slots]
        _combine(parts, mine[index * most :][: parts[0].numel()], combine)

    yield from mesh.pieces([length * mesh.size for length in lengths], mine.dtype, put, take)
    _give(mine, own)


def _combine(parts: Sequence[Tensor], into: Tensor, combine: Combine) -> None:
    combine(parts[0], parts[1], out=into)
    for part in parts[2:]:
        combine(into, part, out=into)


def _give(flat: Tensor, tensor: Tensor) -> None:
    """Bring a result to its tensor, if it had to be computed elsewhere because that is not contiguous."""
    if not tensor.is_contiguous():
        tensor.data.copy_(flat.view(tensor.shape))
