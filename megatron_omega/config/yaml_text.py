"""YAML in and out: plain data only, YAML 1.2's scalars, no key twice. Knows nothing of settings."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from megatron_omega.errors import ConfigError

_MOST_VALUES = 1_000_000


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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read an integer of YAML 1.2: 0100 is one hundred, 0o100 is sixty-four."""
        text = self.construct_scalar(node)
        try:
            return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
        except ValueError:  # Python reads no more than some thousand digits
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(text)} digits is too long", node.start_mark
            ) from None


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_REPLACED_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "timestamp", "value"))
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")
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
        data = yaml.load(text, Loader=_PlainLoader)  # a subclass of SafeLoader
        _require_tree(data, [_MOST_VALUES], ())
        return data
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not plain YAML: {_where(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source} is not plain YAML: it is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source} is not plain YAML: {' '.join(str(error).split())}") from None


def _require_tree(data: Any, left: list[int], inside: tuple[int, ...]) -> None:
    """Raise ValueError if anchors make data contain itself, or repeat it without end."""
    if not isinstance(data, dict | list):
        return
    left[0] -= len(data) + 1
    if id(data) in inside:
        raise ValueError("it contains itself")
    if left[0] < 0:
        raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
    for value in data.values() if isinstance(data, dict) else data:
        _require_tree(value, left, (*inside, id(data)))


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join((getattr(error, "problem", None) or str(error)).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark is not None else problem


def dump(data: Any) -> str:
    """Return `data` as YAML, keys in their own order."""
    return yaml.dump(data, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True, width=120)
