"""Templates: a record's fields put into a text. `{question}`, `{answers.text.0}`; `{{` and `}}` are braces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any


class FieldError(Exception):
    """A record has not what a template asks for; says what."""


@dataclass(frozen=True)
class Template:
    """A text with places for fields."""

    text: str
    parts: tuple[tuple[str, str | None], ...]
    """(literal text, field that follows or None)."""

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template. Raises ValueError, in words, if its braces do not match or a field has no name."""
        parts = []
        for literal, field, specification, conversion in Formatter().parse(text):
            if field is not None and (not field or specification or conversion):
                raise ValueError("a field is {name} or {name.inner.0}, nothing else")
            parts.append((literal, field))
        return cls(text, tuple(parts))

    @property
    def fields(self) -> list[str]:
        """The fields it asks for."""
        return [field for _, field in self.parts if field is not None]

    def render(self, record: Mapping[str, Any]) -> str:
        """Return the text for a record. Raises FieldError."""
        return "".join(literal + ("" if field is None else _value(record, field)) for literal, field in self.parts)

    def render_each(self, record: Mapping[str, Any]) -> list[str]:
        """Return a text for each item, if the only field holds a list; else the one text. Raises FieldError."""
        if len(self.fields) == 1 and isinstance(items := _found(record, self.fields[0]), list):
            count = len(items)
            return [self._with(f"{self.fields[0]}.{number}").render(record) for number in range(count)]
        return [self.render(record)]

    def _with(self, field: str) -> Template:
        """Return the same with another field in the place of its only one."""
        return Template(self.text, tuple((literal, name and field) for literal, name in self.parts))


def _value(record: Mapping[str, Any], field: str) -> str:
    found = _found(record, field)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise FieldError(f"has a {type(found).__name__} in {{{field}}}, not a text or a number")
    return str(found)


def _found(record: Mapping[str, Any], field: str) -> Any:
    found: Any = record
    for name in field.split("."):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, Sequence) and not isinstance(found, str) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise FieldError(f"has no {{{field}}}")
    return found
