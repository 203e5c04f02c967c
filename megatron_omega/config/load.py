"""From files and the command line to one checked `RunConfig`, or to one list of everything that is wrong.

It knows where values come from and how to word an error about them. What they mean stands in `config.schema`, which
of them contradict each other in `config.check`, what DeepSpeed is told in `config.deepspeed`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_omega.config import check, yaml_text
from megatron_omega.config.arguments import Arguments, ConfigSource, Override, parse_arguments, settings, shown_value
from megatron_omega.config.deepspeed import (
    DeepSpeedSettings,
    effective_zero_stage,
    read_deepspeed_json,
    resolve_deepspeed,
)
from megatron_omega.config.derived import Derived, derive, followers
from megatron_omega.config.layout import ranks_per_replica
from megatron_omega.config.peers import counterpart
from megatron_omega.config.schema import BRANCH_FORMS, RunConfig
from megatron_omega.config.shards import spread_corpora
from megatron_omega.errors import ConfigError
from megatron_omega.host.environment import has_gpu
from megatron_omega.host.regular_files import read_text
from megatron_omega.host.shipped import located, presets

__all__ = ["Arguments", "ResolvedRun", "dump_config", "load_config", "parse_arguments", "resolve_run"]


NEAR = 0.75
"""Likeness from which another spelling is taken for the same name."""


@dataclass(frozen=True)
class ResolvedRun:
    """Everything a run was told, checked as a whole."""

    config: RunConfig
    """What is ours."""
    deepspeed: DeepSpeedSettings
    """What DeepSpeed is told."""
    notices: tuple[str, ...]
    """Sentences the user should read: settings that were mapped to others, or that are legal but unwise."""
    derived: tuple[Derived, ...] = ()
    """Settings that were not given and follow from others."""


def resolve_run(arguments: Arguments, world_size: int | None = None, *, trains: bool = True) -> ResolvedRun:
    """Read and check all that a training command names, before any process group exists.

    Args:
        world_size: processes of the run; without it (a dry run), one replica of the layout is assumed.
        trains: whether the run needs text to train on.

    Raises:
        ConfigError: with every finding of YAML, command line and JSON, and of their combination.
    """
    read = _read(arguments.config, arguments.overrides, machine=derive_precision)
    config, findings = read.config, list(read.findings)
    user_json: Mapping[str, Any] | None = None
    try:
        user_json = read_deepspeed_json(arguments.deepspeed_config)
    except ConfigError as error:
        findings += error.findings
    stage = None if user_json is None else effective_zero_stage(config, user_json)
    findings += read.true_of(check.findings(config, world_size, stage, needs_training_text=trains))
    replica = ranks_per_replica(config)
    data_parallel_size = max(1, (world_size or replica) // replica)
    settings_for_engine = None
    try:
        settings_for_engine = resolve_deepspeed(config, user_json or {}, data_parallel_size)
    except ConfigError as error:
        findings += read.true_of(error.findings)
    if findings or settings_for_engine is None:
        raise ConfigError(*findings)
    notices = (*settings_for_engine.notices, *check.notices(config))
    return ResolvedRun(config, settings_for_engine, notices, read.derived)


def load_config(path: ConfigSource, overrides: Sequence[Override] | Mapping[str, str] = ()) -> RunConfig:
    """Read a configuration file, apply overrides, and check what does not depend on processes, ZeRO or a corpus.

    Args:
        path: YAML file, or what one would hold; the schema's defaults where it is None.
        overrides: dotted names with values as typed on a command line (YAML); later ones win.

    Raises:
        ConfigError: with every finding; one line each, `section.field=value: what is needed`.
    """
    if isinstance(overrides, Mapping):
        overrides = [Override(name, text) for name, text in overrides.items()]
    read = _read(path, overrides)
    crossed = check.findings(read.config, world_size=None, zero_stage=None, needs_corpus=False)
    if findings := [*read.findings, *read.true_of(crossed)]:
        raise ConfigError(*findings)
    return read.config


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml_text.dump(config.model_dump(mode="json"))


@dataclass(frozen=True)
class _Read:
    """What a file and overrides say, before settings are held against each other."""

    config: RunConfig
    """Valid: defaults stand in the place of faulty values."""
    findings: tuple[str, ...]
    faulty: frozenset[str]
    """Settings whose value is not the user's; `""` if the file could not be read."""
    given: frozenset[str]
    derived: tuple[Derived, ...]

    def true_of(self, findings: Iterable[str]) -> list[str]:
        """Leave out what a default in the place of a faulty value may have caused; say what is a default."""
        if "" in self.faulty:
            return []
        return [self._with_origins(finding) for finding in findings if not any(name in finding for name in self.faulty)]

    def _with_origins(self, finding: str) -> str:
        derived = {one.name for one in self.derived}
        for setting in settings():
            if setting.name in self.given or f"{setting.name}=" not in finding:
                continue
            value: Any = self.config
            for part in setting.name.split("."):
                value = getattr(value, part, None)
            shown = "|".join(re.escape(text) for text in {shown_value(value), str(value), _listed(value)})
            origin = "derived" if setting.name in derived else "default"
            pattern = rf"({re.escape(setting.name)}=(?:{shown}))(?![\w.]\w|\w)"
            finding = re.sub(pattern, rf"\1 ({origin})", finding, count=1)
        return finding


def _listed(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _read(
    path: ConfigSource,
    overrides: Iterable[Override],
    machine: Callable[[Mapping[str, Any]], Derived | None] | None = None,
) -> _Read:
    """Read a file and overrides; derive what follows from them, and what `machine` adds."""
    findings: list[str] = []
    values: dict[str, Any] = {}
    faulty: set[str] = set()
    try:
        values = read_values(path)
    except ConfigError as error:
        findings += error.findings
        faulty.add("")
    texts = {setting.name: setting.field.default is None for setting in settings() if setting.is_text}
    for override in overrides:
        try:
            value = _typed(override, texts)
            _set(values, override.name.split("."), value)
        except ConfigError as error:
            findings += error.findings
            faulty.add(override.name)
    given = frozenset(_names(values))
    values, derived = derive(spread_corpora(values))
    if machine is not None and "precision.dtype" not in given and (found := machine(values)) is not None:
        _set(values, found.name.split("."), found.value)
        derived.append(found)
    config, invalid, wrong = _validate(values)
    faulty |= wrong - {f"{section}." for section in given}  # a misspelt section beside the right one
    return _Read(config, (*findings, *invalid), frozenset(faulty | (followers(faulty) - given)), given, tuple(derived))


def derive_precision(_: Mapping[str, Any]) -> Derived | None:
    """Return fp32 for a machine without a GPU, where 16-bit products are slower than 32-bit ones."""
    return None if has_gpu() else Derived("precision.dtype", "fp32", "this machine has no GPU")


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of everything that was given."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _names(value, f"{prefix}{name}.")


def _typed(override: Override, texts: Mapping[str, bool]) -> Any:
    """Return the value of `--section.field value`: text as it stands (`texts` says which may be null), else YAML."""
    if override.name not in texts:
        return yaml_text.parse(override.text, f"--{override.name} {_shown(override.text)}")
    return None if texts[override.name] and override.text == "null" else override.text


def read_values(path: ConfigSource) -> dict[str, Any]:
    """Return the sections that a file (or a preset) holds, unchecked. Raises ConfigError if it cannot be read."""
    if path is None or isinstance(path, Mapping):
        return dict(path or {})
    try:
        text = read_text(located(path, presets()))
    except OSError as error:
        known = ", ".join(presets())
        raise ConfigError(
            f"--config {path} cannot be read: {error.strerror}; give the path of a YAML file, or a name that comes "
            f"with the package: {known}"
        ) from None
    values = yaml_text.parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {_shown(values)}; it must hold sections (model:, data:, ...) with settings")
    return {str(name): value for name, value in values.items()}


def _set(values: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Put `value` at the dotted place; absent sections on the way are made."""
    for name in names[:-1]:
        inner = values.get(name)
        if inner is not None and not isinstance(inner, dict):
            return  # the file's own value is not a section: validation says so
        values[name] = dict(inner or {})
        values = values[name]
    values[names[-1]] = value


def _validate(values: dict[str, Any]) -> tuple[RunConfig, list[str], set[str]]:
    """Validate; drop what is faulty and validate the rest, so that its contradictions are found in the same go."""
    findings: list[str] = []
    faulty: set[str] = set()
    while True:
        values = {name: {} if section is None else section for name, section in values.items()}
        try:
            return RunConfig.model_validate(values), findings, faulty
        except ValidationError as error:
            details = error.errors()
        for detail in _outermost(details):
            findings.append(_finding(detail))
            section, field = (*map(str, detail["loc"]), None)[:2]
            faulty |= {f"{section}.{field}" if field else f"{section}.", *_meant(detail)}
            _remove(values, str(section), field)


def _outermost(details: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return one error for each place: a value that fits no member of a union yields one for each member."""
    first: dict[tuple[int | str, ...], ErrorDetails] = {}
    for detail in details:
        first.setdefault(detail["loc"], detail)
    return list(first.values())


def _remove(values: dict[str, Any], section: str, field: str | None) -> None:
    """Take a faulty field out of its section; the whole section where the field cannot be found there."""
    inner = values.get(section)
    if isinstance(inner, dict) and field in inner:
        values[section] = {name: value for name, value in inner.items() if name != field}
    else:
        values.pop(section, None)


def _finding(detail: ErrorDetails) -> str:
    parts = [part for part in detail["loc"] if part not in BRANCH_FORMS]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if detail["type"] == "extra_forbidden" and (inner := _peers_section(place, detail["input"])):
        return f"{place}: there is no such section; {inner}"
    if detail["type"] == "extra_forbidden":
        return f"{place}={_shown(detail['input'])}: there is no such setting; {_nearest(place)}"
    if detail["type"] == "missing":
        return f"{place}: is not given; it has no default"
    if detail["type"] == "model_type":
        return f"{place}={_shown(detail['input'])}: must be a section with settings"
    return f"{place}={_shown(detail['input'])}: {detail['msg'].replace('Input should be', 'must be')}"


def _peers_section(section: str, content: Any) -> str:
    """Answer for the settings of another system's section, as far as they are known."""
    if not isinstance(content, Mapping):
        return ""
    found = {f"{section}.{name}": counterpart(f"{section}.{name}") for name in content}
    return "; ".join(f"{name}: {one.answer}" for name, one in found.items() if one is not None)


def _meant(detail: ErrorDetails) -> list[str]:
    """Return the setting that an unknown name stands for, as far as can be told."""
    place = ".".join(map(str, detail["loc"]))
    found = _candidates(place)[:1] if detail["type"] == "extra_forbidden" else []
    return [name if "." in name else f"{name}." for name in found]


def _nearest(place: str) -> str:
    """Name the setting the user may have meant: that of another system, a misspelt one, one of another section."""
    if (peer := counterpart(place)) is not None and place not in _moved(place):
        return peer.answer
    candidates = _candidates(place)
    return f"did you mean {candidates[0]}?" if candidates else "--help lists every setting"


def _candidates(place: str) -> list[str]:
    if (peer := counterpart(place)) is not None and peer.setting is not None:
        return [peer.setting]
    names = [setting.name for setting in settings()]
    section, _, field = place.partition(".")
    if not field:
        return difflib.get_close_matches(section, list(RunConfig.model_fields), n=1) or _moved(place)
    siblings = [name for name in names if name.startswith(f"{section}.")]
    near = difflib.get_close_matches(place, siblings, n=1, cutoff=NEAR)
    return _moved(place) or near or difflib.get_close_matches(place, names, n=1, cutoff=NEAR)


def _moved(place: str) -> list[str]:
    """Return the settings of this very name in other sections."""
    leaf = place.rpartition(".")[2]
    return [setting.name for setting in settings() if setting.name.rpartition(".")[2] == leaf]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else yaml_text.dump(value).strip().removesuffix("\n...").replace("\n", ", ")
    return text if len(text) <= 60 else f"{text[:57]}..."
