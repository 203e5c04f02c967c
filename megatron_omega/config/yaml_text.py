"""YAML in and out: plain data only, YAML 1.2's scalars, no key twice. Knows nothing of settings."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from megatron_omega.errors import ConfigError


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without its YAML 1.1 surprises: `off` is a word and `1e-3` a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands here a second time", key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)


_REPLACED_TAGS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class _PlainDumper(yaml.SafeDumper):
    """Quotes every string that this loader, or a YAML 1.1 reader, would take for something else."""


_PlainDumper.yaml_implicit_resolvers = {
    first: _PlainLoader.yaml_implicit_resolvers.get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    for first in {*_PlainLoader.yaml_implicit_resolvers, *yaml.SafeDumper.yaml_implicit_resolvers}
}


def _represent_text(dumper: _PlainDumper, text: str) -> yaml.ScalarNode:
    """Quote with escapes what holds a line break other than a newline: unescaped it would be read as another one."""
    style = '"' if any(mark in text for mark in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _represent_text)


def parse(text: str, source: str) -> Any:
    """Return the plain data in `text`.

    Raises:
        ConfigError: the text is not YAML, holds a tag, or gives a key twice; names `source`, line and column.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not plain YAML: {_where(error)}") from None


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark is not None else problem


def dump(data: Any) -> str:
    """Return `data` as YAML, keys in their own order."""
    return yaml.dump(data, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)
