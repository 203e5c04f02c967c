"""Memory that the ranks of one host share, and the words by which they take turns.

Every rank owns memory that the others can read: two slots and a store. In a collective pieces of tensors go through
the slots:

    post     copy the own piece into the next slot, once all have read what lay in it, and tell all
    take     once all have posted, read what is needed from their slots, and tell all

A message to one rank is copied into the store, and lies there until that rank has taken it and said so: who sends
waits for nobody. Words go over a socket between each two ranks: who waits sleeps, and when a rank ends, so do its
connections, at which all others stop. Nothing of it has a name in the file system; it is gone with its processes.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import socket
import struct
import uuid
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SLOT = 1 << 20
"""Bytes of a slot: what a core's cache holds between writing and reading."""
SLOTS = 2
STORE = 1 << 28
"""Bytes of a store: as long as nothing is written there it takes no memory."""
_ALIGNED = 64
_POSTED, _READ, _SENT, _TAKEN = b"prst"
_PLACE = struct.Struct("=qqq")
"""Behind the words for sent and taken: where a message begins in the store, its bytes, and its tag."""
NOWHERE = -1
"""The place of a message that goes another way, since the store has no room for it."""

Need = tuple[list[int], int]
"""Counts of all ranks, and what each must have reached before one goes on."""


class Mesh:
    """The slots of all ranks of a group, and one rank's connections to the others."""

    def __init__(
        self, rank: int, peers: dict[int, socket.socket], memories: Sequence[mmap.mmap], timeout: timedelta
    ) -> None:
        self.rank, self.size = rank, len(memories)
        self._peers, self._timeout = peers, timeout
        wholes = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
        self._slots = [whole[: SLOTS * SLOT].view(SLOTS, SLOT) for whole in wholes]
        self._stores = [whole[SLOTS * SLOT :] for whole in wholes]
        self._posted, self._read = ([0] * self.size for _ in range(2))
        self._next = 0
        self._words = bytearray()
        self._heard = {rank: bytearray() for rank in peers}
        self._used: dict[int, int] = {}
        """Bytes of the messages that lie in the own store, by their places, in the order of these."""
        self._sent: dict[tuple[int, int], deque[tuple[int, int]]] = defaultdict(deque)
        """Places and bytes of messages that others have sent to this rank, by sender and tag."""
        for peer in peers.values():
            peer.setblocking(False)
        _meshes.add(self)

    def pieces(
        self, lengths: Sequence[int], dtype: torch.dtype, put: Callable[[int, Tensor], None],
        take: Callable[[int, list[Tensor]], None],
    ) -> Iterator[Need]:  # fmt: skip
        """Exchange pieces of `lengths` elements: `put(index, slot)` fills ours, `take(index, slots)` reads all."""
        first, self._next = self._next, self._next + len(lengths)
        for index in range(len(lengths) + 1):
            if index < len(lengths):  # one piece ahead of what is read: nobody waits for somebody who reads
                yield self._read, first + index - SLOTS + 1
                put(index, self._slot(self.rank, first + index, lengths[index], dtype))
                self._words.append(_POSTED)
            if index > 0:
                yield self._posted, first + index
                ranks = range(self.size)
                take(index - 1, [self._slot(rank, first + index - 1, lengths[index - 1], dtype) for rank in ranks])
                self._words.append(_READ)

    def _slot(self, rank: int, number: int, length: int, dtype: torch.dtype) -> Tensor:
        return self._slots[rank][number % SLOTS, : length * dtype.itemsize].view(dtype)

    def send(self, tensor: Tensor, rank: int, tag: int) -> bool:
        """Let a one-dimensional `tensor` lie in the store for `rank`, and tell it; False where there is no room."""
        self._listen(rank, waits=False)
        place = self._room(tensor.nbytes)
        if place != NOWHERE:
            self._used[place] = tensor.nbytes
            self._used = dict(sorted(self._used.items()))
            self._stores[self.rank][place : place + tensor.nbytes].view(tensor.dtype).copy_(tensor)
        self._say(rank, bytes([_SENT]) + _PLACE.pack(place, tensor.nbytes, tag))
        return place != NOWHERE

    def receive(self, tensor: Tensor, rank: int, tag: int) -> bool:
        """Wait for a message and copy it into a one-dimensional `tensor`; False where it comes another way."""
        places = self._sent[rank, tag]
        while not places:
            self._listen(rank, waits=True)
        place, num_bytes = places.popleft()
        if num_bytes != tensor.nbytes:
            raise RuntimeError(f"rank {rank} of the group sent {num_bytes} bytes where {tensor.nbytes} were expected")
        if place != NOWHERE:
            tensor.copy_(self._stores[rank][place : place + tensor.nbytes].view(tensor.dtype))
            self._say(rank, bytes([_TAKEN]) + _PLACE.pack(place, num_bytes, tag))
        return place != NOWHERE

    def _room(self, num_bytes: int) -> int:
        """Return the first place where so many bytes are free: the same few are written again and again."""
        begin = 0
        for place, used in self._used.items():
            if place - begin >= num_bytes:
                break
            begin = -(-(place + used) // _ALIGNED) * _ALIGNED
        return begin if num_bytes and begin + num_bytes <= STORE else NOWHERE

    def tell(self) -> None:
        """Say what was posted and read since it was last said."""
        words = bytes(self._words)
        self._words.clear()
        for rank in self._peers if words else ():
            self._say(rank, words)

    def _say(self, rank: int, words: bytes) -> None:
        # One that has gone may have got all that it needs. Whoever needs something of it finds out when it listens.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._peers[rank].sendall(words)

    def reached(self, need: Need, *, waits: bool) -> bool:
        """Return whether all others have reached `need`; `waits`: not before they have.

        Raises RuntimeError where a rank is gone, or does not come within the timeout.
        """
        counts, goal = need
        for rank in self._peers:
            while counts[rank] < goal:
                if not self._listen(rank, waits=waits):
                    return False
        return True

    def _listen(self, rank: int, *, waits: bool) -> bool:
        """Take in what `rank` has said; return whether it was anything."""
        while True:
            try:
                words = self._peers[rank].recv(1 << 12)
                break
            except BlockingIOError:
                if not waits:
                    return False
                self._sleep(rank)
            except OSError as error:
                raise RuntimeError(f"connection closed by peer (rank {rank} of the group): {error.strerror}") from None
        if not words:
            raise RuntimeError(f"connection closed by peer (rank {rank} of the group)")
        self._understand(rank, words)
        return True

    def _understand(self, rank: int, words: bytes) -> None:
        heard = self._heard[rank]
        heard += words
        begin = 0
        while begin < len(heard):
            word = heard[begin]
            if word in (_POSTED, _READ):
                (self._posted if word == _POSTED else self._read)[rank] += 1
                begin += 1
                continue
            if begin + 1 + _PLACE.size > len(heard):  # the rest of the word is still on its way
                break
            place, num_bytes, tag = _PLACE.unpack_from(heard, begin + 1)
            if word == _SENT:
                self._sent[rank, tag].append((place, num_bytes))
            else:
                del self._used[place]
            begin += 1 + _PLACE.size
        del heard[:begin]

    def _sleep(self, rank: int) -> None:
        """Return when `rank` has said something, or its connection has ended."""
        seconds = self._timeout.total_seconds()
        waiting = select.poll()
        waiting.register(self._peers[rank], select.POLLIN)
        if not waiting.poll(1000 * seconds):
            raise RuntimeError(f"timed out after {seconds:g} s waiting for rank {rank} of the group")

    def close(self) -> None:
        """End all connections, at which the others stop too."""
        for peer in self._peers.values():
            peer.close()


_meshes: weakref.WeakSet[Mesh] = weakref.WeakSet()


def _let_go() -> None:
    """Close a forked child's copies: connections that it held open would hide its parent's end from the others."""
    for mesh in _meshes:
        mesh.close()


os.register_at_fork(after_in_child=_let_go)


def connect(store: Any, rank: int, size: int, timeout: timedelta) -> Mesh | None:
    """Connect this rank with the others of a group; None, on all of them, if they are not on one host.

    `store` is the group's own. Collective. Raises RuntimeError where a rank does not come.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        host, address = _host(), f"megatron-omega-{uuid.uuid4().hex}"
        if host:
            listener.bind(f"\0{address}")
            listener.listen(size)
            listener.settimeout(timeout.total_seconds())
        addresses = _addresses(store, rank, size, host, address)
        if not addresses:
            return None
        try:
            return Mesh(rank, *_meet(listener, addresses, rank, timeout), timeout)
        except OSError as error:
            raise RuntimeError(f"ranks of one host could not connect with each other: {error}") from None


def _addresses(store: Any, rank: int, size: int, host: str, address: str) -> list[str]:
    """Return where all ranks listen; nothing if their hosts differ, which the first rank decides."""
    store.set(f"slots/{rank}", json.dumps([host, address]))
    if rank == 0:
        said = [json.loads(store.get(f"slots/{other}")) for other in range(size)]
        is_one_host = host and {other for other, _ in said} == {host}
        store.set("slots", json.dumps([address for _, address in said] if is_one_host else []))
    return json.loads(store.get("slots"))


def _meet(
    listener: socket.socket, addresses: Sequence[str], rank: int, timeout: timedelta
) -> tuple[dict[int, socket.socket], list[mmap.mmap]]:
    """Connect with the ranks before this one, let those behind it connect, and swap memories with each."""
    own = os.memfd_create("megatron-omega")
    os.ftruncate(own, SLOTS * SLOT + STORE)
    files, peers = {rank: own}, dict[int, socket.socket]()
    for other in range(rank):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(timeout.total_seconds())
        peer.connect(f"\0{addresses[other]}")
        socket.send_fds(peer, [struct.pack("i", rank)], [own])
        peers[other], (_, files[other]) = peer, _receive(peer)
    while len(peers) < len(addresses) - 1:
        peer, _ = listener.accept()
        if not _is_ours(peer):
            peer.close()
            continue
        peer.settimeout(timeout.total_seconds())
        other, file = _receive(peer)
        peers[other], files[other] = peer, file
        socket.send_fds(peer, [struct.pack("i", rank)], [own])
    memories = [mmap.mmap(files[other], SLOTS * SLOT + STORE) for other in range(len(addresses))]
    for file in files.values():
        os.close(file)
    return dict(sorted(peers.items())), memories


def _receive(peer: socket.socket) -> tuple[int, int]:
    """Return another's rank and the file of its memory."""
    word, files, _, _ = socket.recv_fds(peer, struct.calcsize("i"), 1)
    if len(files) != 1:
        raise ConnectionResetError("one of them is gone")
    return struct.unpack("i", word)[0], files[0]


def _host() -> str:
    """Return what only processes that can share memory have in common; "" where this system has no such memory."""
    try:
        os.close(os.memfd_create("megatron-omega"))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except (OSError, AttributeError):  # forbidden in this container, or another system than Linux
        return ""


def _is_ours(peer: socket.socket) -> bool:
    """Return whether the other end is a process of this user: any may connect."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return user == os.geteuid()
