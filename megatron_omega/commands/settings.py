"""Print every setting of a run with its meaning and default, as a page in Markdown (docs/settings.md is this).

megatron-omega settings
megatron-omega settings --called train-iters     what a name of another system is called here
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megatron_omega.config.arguments import Setting, kind_of, settings, shown_value
from megatron_omega.config.derived import RULES
from megatron_omega.config.peers import counterpart, counterparts
from megatron_omega.config.schema import RunConfig
from megatron_omega.errors import ConfigError
from megatron_omega.host.command_line import CommandLine

INTRODUCTION = """\
# Settings

Every setting of a run. Each can stand in the YAML file, under its section, or on the command line as
`--section.field value`. What is not given has the default shown here, or follows from what is given: `--dry-run` lists
such settings under "derived", and a message about one says so. What is DeepSpeed's stands in `ds_configs/*.json`.

Written by `megatron-omega settings > docs/settings.md` from `megatron_omega/config/schema/`."""


def main(argv: Sequence[str]) -> None:
    """Print the page, or one answer."""
    parser = CommandLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--called",
        metavar="NAME",
        help="what is its name here: a setting of Megatron-LM, DeepSpeed, Hugging Face, torchtitan",
    )
    arguments = parser.parse_args(argv)
    if arguments.called is None:
        print("\n".join(page()))
        return
    found = counterpart(arguments.called)
    if found is None:
        raise ConfigError(f"--called {arguments.called} is in no table of other systems; the page lists all settings")
    print(found.answer)


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield INTRODUCTION
    following = {rule.name: rule.sources for rule in RULES}
    for section, field in RunConfig.model_fields.items():
        yield f"\n## {section}\n\n{field.description}\n"
        yield "| setting | value | default | meaning |\n|---|---|---|---|"
        for setting in settings():
            if setting.name.startswith(f"{section}."):
                yield _row(setting, following.get(setting.name, ()))
    yield "\n## What others call it\n\n| there | name | here |\n|---|---|---|"
    for name, one in counterparts().items():
        yield f"| {one.owner} | `{name}` | {_here(one.setting, one.remark)} |"


def _row(setting: Setting, sources: Sequence[str]) -> str:
    default = shown_value(setting.field.get_default(call_default_factory=True))
    follows = f" Follows from {' or '.join(f'`{source}`' for source in sources)} if that is given." if sources else ""
    meaning = " ".join((setting.field.description or "").split())
    return f"| `{setting.name}` | {_cell(kind_of(setting.field))} | {_cell(default)} | {_cell(meaning + follows)} |"


def _here(setting: str | None, remark: str) -> str:
    shown = {"deepspeed_config": "`--deepspeed_config`"}.get(setting or "", f"`{setting}`")
    return _cell(remark if setting is None else shown + (f" ({remark})" if remark else ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
