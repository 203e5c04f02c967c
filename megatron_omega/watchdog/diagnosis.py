"""Who failed where, in sentences. Pure functions of what the monitors reported; knows neither sockets nor clocks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megatron_omega.errors import BUG, LOST, ConfigError, FaultyMachineError, HangError
from megatron_omega.watchdog.ledger import Row
from megatron_omega.watchdog.stacks import Frame, caller_of, collective_of
from megatron_omega.watchdog.waits import Verdict, find_culprits

_COMMUNICATION = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|was closed)|broken pipe|timed out|socket|TCPStore|peer", re.IGNORECASE
)
_DEVICE_FAULT = re.compile(
    r"uncorrectable ECC|hardware error|NVLink|fallen off the bus|device (is lost|unavailable)|"
    r"CUDA error: (unknown error|unspecified launch failure|all CUDA-capable devices are busy)|Xid",
    re.IGNORECASE,
)
"""What a driver says of a broken device. Errors that a program can cause by itself are not among them."""
_MOST_BLAMED = 0.05
"""Share of the hosts that may be blamed for a hang: if more stand still, the cause is what they share."""
_COMMUNICATION_KINDS = {"RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError", "ConnectionError"}


@dataclass(frozen=True)
class Member:
    """One rank and where it runs."""

    rank: int
    place: str
    """Coordinates, as in `pp 0, dp 1, tp 1`."""
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place}) on {self.host}"


@dataclass(frozen=True)
class Failure:
    """How a rank ended."""

    member: Member
    phase: str
    message: str = ""
    """What the user is told; empty where the process was gone without a word."""
    kind: str = ""
    """Class of the exception."""
    trace: str = ""
    """Traceback; empty where the failure is not a bug."""
    code: int = BUG

    @property
    def is_of_device(self) -> bool:
        """Whether the device of this rank is broken."""
        return bool(self.kind) and _DEVICE_FAULT.search(self.message) is not None

    @property
    def is_consequence(self) -> bool:
        """Whether this looks like the echo of another rank's end: a broken connection."""
        return self.kind in _COMMUNICATION_KINDS and _COMMUNICATION.search(self.message) is not None


@dataclass(frozen=True)
class Standing:
    """Where a rank stood when a hang was judged."""

    member: Member
    phase: str
    step: int
    age_seconds: float
    """Since its last sign of progress."""
    state: str = "S"
    """Process state, as in /proc/PID/stat: T is stopped, D waits for a device."""
    frames: Sequence[Frame] = ()
    """Its main thread, innermost first; empty where no stack could be had."""
    rows: Sequence[Row] = ()
    """The messages it has counted."""
    waits_for_device: bool = False
    has_answered: bool = True
    """Whether its monitor was heard when all were asked. One that was not yet is no suspect for that."""

    @property
    def waits_in(self) -> str | None:
        if self.state == "T":
            return None
        return collective_of(self.frames) or ("the device" if self.waits_for_device else None)


@dataclass(frozen=True)
class Diagnosis:
    """What is printed, once, and with which code every rank ends."""

    code: int
    lines: tuple[str, ...]
    trace: str = ""
    event: dict[str, Any] = field(default_factory=dict)
    blamed: tuple[str, ...] = ()
    """Hosts that the run should do without."""
    reason: str = ""
    """Why, in a few words."""


def diagnose_failure(failures: Sequence[Failure]) -> Diagnosis:
    """Name the first rank that failed by itself; `failures` are in the order in which they became known."""
    causes = [failure for failure in failures if failure.is_of_device or not failure.is_consequence]
    first = (causes or failures)[0]
    if not first.kind:
        what = "is gone without a word: it was killed (a signal, or the system out of memory)"
        line = f"{first.member} {what}, while {first.phase}; started again, the run continues from its last checkpoint"
    elif first.trace:
        line = f"{first.member} failed while {first.phase}: {first.kind}: {first.message}"
    else:
        line = f"{first.message} ({first.member}, while {first.phase})"
    event = {"event": "failure", "rank": first.member.rank, "host": first.member.host, "phase": first.phase,
             "kind": first.kind or "Lost", "message": first.message}  # fmt: skip
    if first.is_of_device:
        line += "; the device is broken: started again without this host, the run continues from its last checkpoint"
        blamed = (first.member.host,)
        return Diagnosis(FaultyMachineError.exit_code, (f"error: {line}",), first.trace, event, blamed, "device error")
    return Diagnosis(first.code, (f"error: {line}",), first.trace, event)


def diagnose_silence(silent: Sequence[Member], seconds: float) -> Diagnosis:
    """Say which hosts are not heard of any more."""
    hosts = sorted({member.host for member in silent})
    ranks = rank_ranges(member.rank for member in silent)
    line = (
        f"error: no word from {', '.join(hosts)} ({ranks}) for {seconds:.0f} s: the host or the network is gone; "
        "started again on other hosts, the run continues from its last checkpoint"
    )
    event = {"event": "failure", "kind": "Silence", "hosts": hosts}
    return Diagnosis(LOST, (line,), event=event, blamed=tuple(hosts), reason=f"no word for {seconds:.0f} s")


def diagnose_absence(present: Sequence[Member], world_size: int, seconds: float) -> Diagnosis:
    """Say which ranks never arrived."""
    missing = sorted(set(range(world_size)) - {member.rank for member in present})
    by_host: dict[str, list[int]] = defaultdict(list)
    for member in present:
        by_host[member.host].append(member.rank)
    arrived = "; ".join(f"{rank_ranges(ranks)} on {host}" for host, ranks in sorted(by_host.items()))
    line = (
        f"error: {rank_ranges(missing)} of {world_size} did not arrive within {seconds:.0f} s (arrived: {arrived}); "
        "see whether they were started there, and whether they see the same run folder"
    )
    return Diagnosis(HangError.exit_code, (line,), event={"event": "failure", "kind": "Absent", "ranks": missing})


def diagnose_refusal(findings: Sequence[tuple[str, int]]) -> Diagnosis:
    """List everything that speaks against starting; `findings` are (sentence, exit code)."""
    sentences = list(dict.fromkeys(sentence for sentence, _ in findings))
    codes = [code for _, code in findings]
    code = ConfigError.exit_code if ConfigError.exit_code in codes else codes[0]
    if len(sentences) == 1:
        return Diagnosis(code, (f"error: {sentences[0]}",))
    return Diagnosis(code, ("errors:", *(f"{number}. {text}" for number, text in enumerate(sentences, start=1))))


def disagreements(fingerprints: Mapping[int, Mapping[str, str]]) -> list[str]:
    """Return a finding for each thing (configuration, code, versions) that is not the same on all ranks that say it."""
    found = []
    for name in dict.fromkeys(name for values in fingerprints.values() for name in values):
        holders: dict[str, list[int]] = defaultdict(list)
        for rank, values in sorted(fingerprints.items()):
            if name in values:
                holders[values[name]].append(rank)
        if len(holders) > 1:
            sides = ", ".join(f"{rank_ranges(ranks)} {value}" for value, ranks in holders.items())
            found.append(f"ranks do not agree on {name}: {sides}; start all of them from the same files")
    return found


def diagnose_hang(standings: Sequence[Standing], folder: str) -> Diagnosis:
    """Name the ranks that the others wait for, and who waits where."""
    answered = [standing for standing in standings if standing.has_answered]
    unheard = [standing.member.rank for standing in standings if not standing.has_answered]
    verdict = find_culprits(
        {standing.member.rank: standing.rows for standing in answered},
        {standing.member.rank for standing in answered if standing.waits_in is not None},
        {standing.member.rank for standing in answered if standing.waits_for_device},
    )
    guilty = _guilty(answered, set(verdict.missed), is_complete=not unheard)
    lines = [line for one in guilty for line in (f"hang: {_plight(one)}", *_missing(verdict, one.member.rank))]
    lines += [] if guilty else [f"hang: {_nobody(answered, unheard, verdict)}"]
    lines += _waiting([standing for standing in answered if standing not in guilty])
    if guilty and unheard:
        lines.append(f"  no answer in time from {rank_ranges(unheard)}")
    lines.append(f"  stacks of all ranks: {folder}")
    event = {"event": "hang", "ranks": [standing.member.rank for standing in guilty], "stacks": folder,
             "hosts": sorted({standing.member.host for standing in guilty})}  # fmt: skip
    blamed, hosts = tuple(event["hosts"]), {standing.member.host for standing in standings}
    blamed = blamed if len(blamed) <= max(1, _MOST_BLAMED * len(hosts)) < len(hosts) else ()
    return Diagnosis(HangError.exit_code, tuple(lines), event=event, blamed=blamed, reason="hang")


def _guilty(standings: Sequence[Standing], behind: Collection[int], *, is_complete: bool) -> list[Standing]:
    """Return who is stopped; else who is behind; else who cannot be looked at, or waits for nobody.

    Where not everybody has answered, one that waits itself may wait for one of those.
    """
    stopped = [standing for standing in standings if standing.state in "TtZ"]
    late = [standing for standing in standings if standing.member.rank in behind]
    late = late if is_complete else [standing for standing in late if standing.waits_in is None]
    if stopped or late:
        return stopped or late
    unreadable = [standing for standing in standings if not standing.frames]
    idle = [standing for standing in standings if standing.waits_in is None]
    is_told_by_stacks = not any(standing.waits_for_device for standing in standings)
    return unreadable or (idle if is_told_by_stacks else [])


def _nobody(answered: Sequence[Standing], unheard: Sequence[int], verdict: Verdict) -> str:
    """Say what is known where nobody can be named."""
    if unheard:
        return f"every rank that answered waits for another; no answer from {rank_ranges(unheard)}"
    if verdict.circle:
        circle = ", which waits for ".join(f"rank {rank}" for rank in (*verdict.circle, verdict.circle[0]))
        return f"every rank waits for another; they disagree about what comes next: {circle}"
    if any(standing.waits_for_device for standing in answered):
        return "every rank has come to the same messages and waits for its device: a device or the network is stuck"
    return "every rank waits for another; they disagree about what comes next"


def _missing(verdict: Verdict, rank: int) -> list[str]:
    missed = verdict.missed.get(rank)
    if missed is None:
        return []
    who, is_one = "its device has" if missed.by_device else "it has", len(missed.waiting) == 1
    return [f"  {who} not come to {missed.row.operation}, in which {rank_ranges(missed.waiting)} wait{'s' * is_one}"]


def _plight(standing: Standing) -> str:
    how = {"T": "; it is stopped (SIGSTOP)", "t": "; a debugger holds it", "D": "; it waits for a device"}
    frames = standing.frames
    where = f"\n  at {frames[0]}" if frames else "\n  its stack could not be had"
    own = caller_of(frames)
    if own is not None and own != frames[0]:
        where += f", called from {own}"
    return (
        f"{standing.member}, process {standing.member.pid}, has made no progress for {standing.age_seconds:.1f} s "
        f"while {standing.phase}{how.get(standing.state, '')}{where}"
    )


def _waiting(standings: Sequence[Standing]) -> list[str]:
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for standing in standings:
        call = standing.waits_in or "no communication"
        places[call, str(caller_of(standing.frames) or "an unknown place")].append(standing.member.rank)
    return [f"  {rank_ranges(ranks)} waiting in {call}, at {place}" for (call, place), ranks in places.items()]


def rank_ranges(ranks: Iterable[int]) -> str:
    """Return `rank 3`, or `ranks 0-3, 6`.

    >>> rank_ranges([6, 0, 1, 2, 3]), rank_ranges([3])
    ('ranks 0-3, 6', 'rank 3')
    """
    ordered = sorted(ranks)
    starts = [ordered[0], *(second for first, second in pairwise(ordered) if second != first + 1)]
    ends = [*(first for first, second in pairwise(ordered) if second != first + 1), ordered[-1]]
    parts = [f"{start}" if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {', '.join(parts)}"
