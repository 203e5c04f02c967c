"""What a check of a device finds: numbers with their limits, one a line. The first beyond its limit ends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One number and what it may be."""

    check: str
    """Name of the check."""
    what: str
    """Of what the number is, in words."""
    value: float
    limit: float | None = None
    """The largest that passes (`is_floor`: the smallest); None: the number is for reading only."""
    unit: str = ""
    is_floor: bool = False
    detail: str = ""
    """What else is to be known, such as the kernel that ran."""

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        if not math.isfinite(self.value):
            return False
        return self.value >= self.limit if self.is_floor else self.value <= self.limit

    def __str__(self) -> str:
        bound = "" if self.limit is None else f", {'at least' if self.is_floor else 'at most'} {_number(self.limit)}"
        unit = f" {self.unit}" if self.unit else ""
        detail = f" ({self.detail})" if self.detail else ""
        status = "PASS" if self.passed else "FAIL"
        return f"{status}  {self.check}: {self.what}: {_number(self.value)}{unit}{bound}{detail}"

    def as_json(self) -> dict[str, Any]:
        value = self.value if math.isfinite(self.value) else str(self.value)
        return asdict(self) | {"value": value, "status": "PASS" if self.passed else "FAIL"}


@dataclass(frozen=True)
class LeftOut:
    """A check that means nothing here."""

    check: str
    reason: str
    passed: bool = True

    def __str__(self) -> str:
        return f"SKIP  {self.check}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        return {"check": self.check, "status": "SKIP", "reason": self.reason}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.3g}"


@dataclass(frozen=True)
class Setting:
    """Where is checked."""

    device: str = "cpu"
    """"cpu" or "cuda"."""
    gpus: int = 1
    """How many GPUs are used; on a CPU, checks of several ranks take two."""
    prepare: Callable[[], None] | None = None
    """Called first in every rank that a check starts: where tests put their faults."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def ranks(self) -> int:
        """Ranks of the checks that need several."""
        return self.gpus if self.on_gpu else 2


Check = Callable[[Setting], Iterator[Finding | LeftOut]]


def until_failure(findings: Iterable[Finding | LeftOut]) -> Iterator[Finding | LeftOut]:
    """Yield findings up to the first that did not pass, and it."""
    for finding in findings:
        yield finding
        if not finding.passed:
            return
