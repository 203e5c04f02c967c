"""The command line of a run: a configuration file, and `--section.field value` for every setting of the schema.

Options and their help are read off `schema.RunConfig`; nothing is listed twice. What a value means is decided by
`config.load`; here it stays the text that the user typed.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_omega.config.peers import counterpart
from megatron_omega.config.schema import RunConfig, Section
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine

ConfigSource = Path | str | Mapping[str, Any] | None
"""Where settings come from: a file, the name of a preset, or the settings themselves."""


@dataclass(frozen=True)
class Setting:
    """One field of the schema under its dotted name."""

    name: str
    """As in `model.hidden_size`."""
    field: FieldInfo

    @property
    def is_switch(self) -> bool:
        return self.field.annotation is bool

    @property
    def is_text(self) -> bool:
        """Whether its value is text, which is taken as it was typed."""
        kinds = {_plain(kind) for kind in get_args(self.field.annotation) or (self.field.annotation,)}
        return str in kinds and kinds <= {str, type(None)}

    @property
    def help(self) -> str:
        return f"{self.field.description} (default: {shown_value(self.field.get_default(call_default_factory=True))})"


def shown_value(value: Any) -> str:
    """Return a value as a user would write it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else (str(value) or '""')


def nested_section(field: FieldInfo) -> type[Section] | None:
    """Return the section a field holds, also where it may be absent."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def settings(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting below `section`, in the order of the schema; fields of optional sections too."""
    for name, field in section.model_fields.items():
        inner = nested_section(field) if not _is_collection(field) else None
        if inner is None or prefix:
            yield Setting(prefix + name, field)
        if inner is not None:
            yield from _required_as_absent(settings(inner, f"{prefix}{name}."))


def _is_collection(field: FieldInfo) -> bool:
    kinds = [_plain(kind) for kind in (field.annotation, *get_args(field.annotation))]
    return getattr(field.annotation, "__origin__", None) is tuple or any(get_origin(kind) is tuple for kind in kinds)


def _required_as_absent(found: Iterator[Setting]) -> Iterator[Setting]:
    for setting in found:
        if setting.field.is_required():
            optional = FieldInfo(
                annotation=setting.field.annotation, default=None, description=setting.field.description
            )
            yield Setting(setting.name, optional)
        else:
            yield setting


@dataclass(frozen=True)
class Override:
    """`--section.field value`, not yet interpreted."""

    name: str
    text: str


@dataclass(frozen=True)
class Arguments:
    """What a command line says."""

    config: ConfigSource = None
    """YAML file of the run, or what one would hold; the schema's defaults where there is none."""
    deepspeed_config: Path | str | None = None
    """JSON file with what is DeepSpeed's; ZeRO-1 and DeepSpeed's defaults where there is none."""
    overrides: tuple[Override, ...] = ()
    """In the order given: the last one wins."""
    dry_run: bool = False
    """Print the resolved configuration, layout and estimate, and end."""
    json: bool = False
    """Print for a program to read."""
    tasks: str | None = None
    """What --tasks names: a fine-tuning."""


class _Collect(argparse.Action):
    """Append (setting, text) to the overrides, so that their order is kept."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.overrides.append(Override(self.dest, values))


def build_parser(program: str | None = None, about: str | None = None) -> argparse.ArgumentParser:
    """Return the parser: the run's own options, then one for each setting, grouped by section.

    about: what `--help` says of the verb.
    """
    parser = CommandLine(
        prog=program,
        allow_abbrev=False,
        usage="%(prog)s [--config YAML] [--load PATH] [--deepspeed_config JSON] [--dry-run] "
        "[--section.field VALUE ...]",
        description=about or "Every setting can be given in the YAML file or as --section.field value.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Values are YAML: --model.encoder_branches '[full, local]', --data.corpora '[{prefix: corpus/text}]'.",
    )
    parser.set_defaults(overrides=[])
    _add_run_options(parser)
    groups: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        groups[name] = parser.add_argument_group(f"{name} - {(field.description or '').removesuffix('.').lower()}")
    for setting in settings():
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if setting.is_switch else {}
        groups[setting.name.partition(".")[0]].add_argument(
            f"--{setting.name}",
            action=_Collect,
            dest=setting.name,
            default=argparse.SUPPRESS,
            metavar=kind_of(setting.field),
            help=setting.help.replace("%", "%%"),
            **switch,
        )
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="YAML", help="configuration of the run")
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", type=Path, metavar="JSON",
        help="what is DeepSpeed's: ZeRO, offload, communication (default: that of ds_configs/zero1.json)",
    )  # fmt: skip
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print what would run, and end")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON")
    parser.add_argument(
        "--load", "--checkpoint", dest="checkpoint.load", action=_Collect, default=argparse.SUPPRESS, metavar="PATH",
        help="short for --checkpoint.load: run, checkpoints or step-... folder; an export gives its weights",
    )  # fmt: skip
    parser.add_argument(
        "--load-weights-only", "--load_weights_only", dest="checkpoint.load_weights_only", action=_Collect,
        nargs="?", const="true", default=argparse.SUPPRESS, metavar="BOOL",
        help="short for --checkpoint.load_weights_only",
    )  # fmt: skip
    parser.add_argument(
        "--max-minutes", "--max_minutes", dest="resilience.max_minutes", action=_Collect, default=argparse.SUPPRESS,
        metavar="MINUTES", help="short for --resilience.max_minutes",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", metavar="RECORDS|YAML",
        help="fine-tune --load on these: records with the fields prompt and target, or a YAML list for data.tasks",
    )  # fmt: skip
    # Launchers add these to the command line; ranks are read from the environment instead.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)


def kind_of(field: FieldInfo) -> str:
    """Return the kind of a value in a word: N, X, TEXT, BOOL, YAML, [...], or its choices."""
    if _is_collection(field):
        return "[...]"
    kinds = [_plain(kind) for kind in get_args(field.annotation) or (field.annotation,)]
    choices = [kind for kind in kinds if isinstance(kind, str)]
    if choices:
        return "{" + ",".join(choices) + "}"
    names = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
    return next((names[kind] for kind in kinds if kind in names), "YAML")


def _plain(kind: Any) -> Any:
    """Return `int` for `Annotated[int, ...]`."""
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind


def parse_arguments(argv: Sequence[str], program: str | None = None, about: str | None = None) -> Arguments:
    """Read a command line. `--help` prints, `about` first, and ends the process.

    Options with a dot that are no setting are kept as overrides: `config.load` reports them with all other errors.

    Raises:
        ConfigError: an option is unknown or lacks its value.
    """
    parser = build_parser(program, about)
    known, rest = parser.parse_known_args(list(argv))
    return Arguments(
        config=known.config,
        deepspeed_config=known.deepspeed_config,
        overrides=(*known.overrides, *read_overrides(rest, parser)),
        dry_run=known.dry_run,
        json=known.json,
        tasks=known.tasks,
    )


def read_overrides(words: Sequence[str], parser: argparse.ArgumentParser) -> tuple[Override, ...]:
    """Return the `--section.field value` among what `parser` left over (`parse_known_args`); for tools with options
    of their own.

    Raises:
        ConfigError: something else is left over.
    """
    overrides, findings = _unknown_options(words, parser)
    if findings:
        raise ConfigError(*findings)
    return tuple(overrides)


def _unknown_options(rest: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[Override], list[str]]:
    """Split what a parser did not know into settings (known to it or not), and findings for everything else."""
    options = [option for action in parser._actions for option in action.option_strings if "." not in option]
    overrides: list[Override] = []
    findings: list[str] = []
    words = list(rest)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            findings.append(f"command line: {word!r} belongs to no option; options are --name value")
            continue
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
        if "." in name:
            overrides.append(Override(name.removeprefix("--"), value))
        else:
            findings.append(f"command line: there is no option {name}; {_hint(name, options)}")
    return overrides, findings


def _hint(name: str, options: Sequence[str]) -> str:
    """Say what an unknown option may stand for: a setting, another system's, or a misspelling."""
    leaf = name.lstrip("-").replace("-", "_")
    if same := [setting.name for setting in settings() if setting.name.rpartition(".")[2] == leaf]:
        return f"did you mean {' or '.join(f'--{found}' for found in same)}?"
    if (peer := counterpart(name)) is not None:
        return peer.answer
    near = difflib.get_close_matches(name, options, n=1, cutoff=0.88)
    return f"did you mean {near[0]}?" if near else "--help lists every option"
