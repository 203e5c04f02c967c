"""From files and the command line to one checked `RunConfig`, or to one list of everything that is wrong.

It knows where values come from and how to word an error about them. What they mean stands in `config.schema`, which
of them contradict each other in `config.check`, what DeepSpeed is told in `config.deepspeed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_omega.config import check, yaml_text
from megatron_omega.config.arguments import Arguments, ConfigSource, Override, parse_arguments, settings
from megatron_omega.config.deepspeed import (
    DeepSpeedSettings,
    effective_zero_stage,
    read_deepspeed_json,
    resolve_deepspeed,
)
from megatron_omega.config.layout import ranks_per_replica
from megatron_omega.config.schema import BRANCH_FORMS, RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host.shipped import located, presets

__all__ = ["Arguments", "ResolvedRun", "dump_config", "load_config", "parse_arguments", "resolve_run"]


@dataclass(frozen=True)
class ResolvedRun:
    """Everything a run was told, checked as a whole."""

    config: RunConfig
    """What is ours."""
    deepspeed: DeepSpeedSettings
    """What DeepSpeed is told."""
    notices: tuple[str, ...]
    """Sentences the user should read: settings that were mapped to others, or that are legal but unwise."""


def resolve_run(arguments: Arguments, world_size: int | None = None, *, trains: bool = True) -> ResolvedRun:
    """Read and check all that a training command names, before any process group exists.

    Args:
        world_size: processes of the run; without it (a dry run), one replica of the layout is assumed.
        trains: whether the run needs text to train on.

    Raises:
        ConfigError: with every finding of YAML, command line and JSON, and of their combination.
    """
    config, findings, faulty = _read(arguments.config, arguments.overrides)
    user_json: Mapping[str, Any] = {}
    try:
        user_json = read_deepspeed_json(arguments.deepspeed_config)
    except ConfigError as error:
        findings += error.findings
    stage = effective_zero_stage(config, user_json)
    crossed = check.findings(config, world_size, stage, needs_training_text=trains)
    findings += _unrelated_to(faulty, crossed)
    replica = ranks_per_replica(config)
    data_parallel_size = max(1, (world_size or replica) // replica)
    settings_for_engine = None
    try:
        settings_for_engine = resolve_deepspeed(config, user_json, data_parallel_size)
    except ConfigError as error:
        findings += _unrelated_to(faulty, error.findings)
    if findings or settings_for_engine is None:
        raise ConfigError(*findings)
    notices = (*settings_for_engine.notices, *check.notices(config))
    return ResolvedRun(config, settings_for_engine, notices)


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
    config, findings, faulty = _read(path, overrides)
    findings += _unrelated_to(faulty, check.findings(config, world_size=None, zero_stage=None, needs_corpus=False))
    if findings:
        raise ConfigError(*findings)
    return config


def dump_config(config: RunConfig) -> str:
    """Return the whole configuration as YAML that `load_config` reads back to an equal one."""
    return yaml_text.dump(config.model_dump(mode="json"))


def _read(path: ConfigSource, overrides: Iterable[Override]) -> tuple[RunConfig, list[str], set[str]]:
    """Return a valid configuration (defaults in the place of faulty values), the findings, and the faulty names."""
    findings: list[str] = []
    values: dict[str, Any] = {}
    try:
        values = _read_file(path)
    except ConfigError as error:
        findings += error.findings
    for override in overrides:
        try:
            value = yaml_text.parse(override.text, f"--{override.name} {override.text}")
            _set(values, override.name.split("."), value)
        except ConfigError as error:
            findings += error.findings
    config, invalid, faulty = _validate(values)
    return config, findings + invalid, faulty


def _read_file(path: ConfigSource) -> dict[str, Any]:
    if path is None or isinstance(path, Mapping):
        return dict(path or {})
    try:
        text = located(path, presets()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        known = ", ".join(presets())
        raise ConfigError(
            f"--config {path} cannot be read: {reason}; give the path of a YAML file, or a name that comes with the "
            f"package: {known}"
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
            faulty.add(f"{section}.{field}" if field else f"{section}.")
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
    if detail["type"] == "extra_forbidden":
        return f"{place}={_shown(detail['input'])}: there is no such setting; {_nearest(place)}"
    if detail["type"] == "missing":
        return f"{place}: is not given; it has no default"
    if detail["type"] == "model_type":
        return f"{place}={_shown(detail['input'])}: must be a section with settings"
    return f"{place}={_shown(detail['input'])}: {detail['msg'].replace('Input should be', 'must be')}"


def _nearest(place: str) -> str:
    """Name the setting the user may have meant: a misspelt one, or the same field in another section."""
    names = [setting.name for setting in settings()]
    sections = list(RunConfig.model_fields)
    section, _, field = place.partition(".")
    if not field:
        near = difflib.get_close_matches(section, sections, n=1)
        moved = [name for name in names if name.rpartition(".")[2] == section]
        candidates = near or moved
    else:
        siblings = [name for name in names if name.startswith(f"{section}.")]
        leaf = field.rpartition(".")[2]
        moved = [name for name in names if name.rpartition(".")[2] == leaf]
        candidates = (
            moved or difflib.get_close_matches(place, siblings, n=1) or difflib.get_close_matches(place, names, n=1)
        )
    return f"did you mean {candidates[0]}?" if candidates else "--help lists every setting"


def _unrelated_to(faulty: set[str], findings: Iterable[str]) -> list[str]:
    """Leave out what a default in the place of a faulty value may have caused."""
    return [finding for finding in findings if not any(name in finding for name in faulty)]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else yaml_text.dump(value).strip().removesuffix("\n...").replace("\n", ", ")
    return text if len(text) <= 60 else f"{text[:57]}..."
