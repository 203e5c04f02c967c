"""The machine at hand, as far as it was measured: a calibration in the working directory, else one kept for it.

Where it was never measured, the built-in figures of a small CPU core stand in, and say so. No torch: measuring is
`studies.quick_calibration`'s.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_omega.config import yaml_text
from megatron_omega.errors import ConfigError
from megatron_omega.planner.hardware import Hardware, HardwareFile, find_hardware, read_hardware

CALIBRATED = Path("runs/hardware.yaml")
"""Where megatron-omega calibrate leaves what it measured, relative to the working directory."""
CPU = "cpu"


@dataclass(frozen=True)
class Machine:
    """What a forecast is about."""

    hardware: Hardware
    origin: str
    """Where its figures come from, in words: `calibrated 3 hours ago`, `not calibrated: ...`."""
    is_calibrated: bool


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cache_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the quick calibration of this machine is kept: another processor or number of cores is another."""
    home = Path(environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/tmp")) / ".cache")
    facts = f"{_processor()} {cores()} {os.sysconf('SC_PHYS_PAGES')}"
    return home / "megatron-omega" / f"machine-{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}.yaml"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def keep(file: HardwareFile) -> Path:
    """Keep a quick calibration for this machine; return where. A read-only home is no error: it is measured again."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(yaml_text.dump(file.model_dump(mode="json")), encoding="utf-8")
        partial.replace(path)
    except OSError:
        pass
    return path


def this_machine(device_name: str = CPU) -> Machine | None:
    """Return the machine called `device_name` ("cpu", or what the driver calls a GPU); None: not listed."""
    for path, how in ((CALIBRATED, "calibrated"), (cache_file(), "quickly calibrated")):
        if (file := _readable(path)) is not None and (name := name_in(file, device_name)):
            origin = f"{how} {age(time.time() - path.stat().st_mtime)} ago"
            return Machine(find_hardware(name, file=file), origin, is_calibrated=True)
    file = read_hardware()
    name = name_in(file, device_name)
    if name is None:
        return None
    hardware = find_hardware(name, file=file)
    if name != CPU:
        return Machine(hardware, "not calibrated: the maker's figures", is_calibrated=False)
    facts = hardware.facts.model_copy(update={"cores": cores()})
    origin = "not calibrated: figures of another CPU; megatron-omega calibrate measures this one"
    return Machine(replace(hardware, facts=facts), origin, is_calibrated=False)


def _readable(path: Path) -> HardwareFile | None:
    try:
        return read_hardware(path) if path.exists() else None
    except ConfigError:
        return None  # of another version


def name_in(file: HardwareFile, device_name: str) -> str | None:
    """Return the entry whose driver names all stand in `device_name`: the one with most of them."""
    wanted = device_name.lower()
    if wanted in file.accelerators:
        return wanted
    words = {name: [word.lower() for word in facts.driver_names] for name, facts in file.accelerators.items()}
    found = [name for name in words if words[name] and all(word in wanted for word in words[name])]
    return max(found, key=lambda name: (len(words[name]), sum(map(len, words[name]))), default=None)


def age(seconds: float) -> str:
    """Return an age in its largest unit.

    >>> age(5), age(3 * 3600), age(86400 * 40)
    ('a moment', '3 hours', '40 days')
    """
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count > 1)}"
    return "a moment"
