"""The label of a position that no loss counts."""

from typing import Final

IGNORED_LABEL: Final = -100
