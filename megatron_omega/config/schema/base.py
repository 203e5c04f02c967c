"""What all sections share: kinds of numbers, and the strictness of a section."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


_MOST: dict[str, int] = {
    r".*_layers|virtual_stages": 10_000,
    r"num_workers": 1_024,
    r"num_attention_heads|.*_parallel_size|prefetch_batches": 2**17,
    r".*_seq_length|.*batch_size": 2**27,
    r".*hidden_size|vocab_size|head_dim|.*_width|.*_blocks|.*_window|(depth|width)_base|loss_chunk_tokens": 2**24,
    r"initial_loss_scale_power": 64,
    r".*learning_rate": 1_000,
    r"seed": 2**63 - 1,
}
"""Beyond these a number is a slip of the hand, and would cost hours or all memory before anything is said."""
_MOST_INTEGER, _MOST_FLOAT = 2**48, 1e20


def most_of(name: str, value: float) -> float:
    """Return the largest number that makes sense in a setting called `name`."""
    named = (most for pattern, most in _MOST.items() if re.fullmatch(pattern, name))
    return next(named, _MOST_INTEGER if isinstance(value, int) else _MOST_FLOAT)


class Section(BaseModel):
    """One section of the configuration: frozen, strict about names and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _makes_sense(cls, value: Any, field: ValidationInfo) -> Any:
        """Refuse numbers beyond sense, and text that no file system and no terminal takes."""
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and abs(item) > (most := most_of(str(field.field_name), item)):
                raise PydanticCustomError("beyond_sense", "must be at most {most}", {"most": f"{most:g}"})
            if isinstance(item, str) and ("\0" in item or not _is_encodable(item)):
                raise PydanticCustomError("strange_text", "must be text in UTF-8 without NUL")
        return value


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
