"""What a setting of Megatron-LM, DeepSpeed, Hugging Face or torchtitan is called here; peers.yaml has the table.

Knows names only; that each of ours exists is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from megatron_omega.config import yaml_text


@dataclass(frozen=True)
class Counterpart:
    """What another system's setting is here."""

    owner: str
    setting: str | None
    """Our name; None: nothing means the same."""
    remark: str
    """How its value differs; the whole answer if there is no setting."""

    @property
    def answer(self) -> str:
        """In words, for somebody who used the other name."""
        if self.setting is None:
            return self.remark
        option = "--deepspeed_config" if self.setting == "deepspeed_config" else self.setting
        remark = f" ({self.remark})" if self.remark else ""
        return f"{option} does that here{remark}; the name is {self.owner}'s"


@cache
def counterparts() -> dict[str, Counterpart]:
    """Return the counterparts of all names in the file, which are in lower case with underscores."""
    text = Path(__file__).with_name("peers.yaml").read_text(encoding="utf-8")
    owners: dict[str, dict[str, Any]] = yaml_text.parse(text, "peers.yaml")
    return {name: _read(owner, value) for owner, names in owners.items() for name, value in names.items()}


def counterpart(name: str) -> Counterpart | None:
    """Return what `name` of another system is here: as it stands, or without its section.

    >>> counterpart("--train-iters").setting, counterpart("training.lr").setting, counterpart("colour")
    ('training.train_steps', 'optimizer.learning_rate', None)
    """
    plain = name.lstrip("-").replace("-", "_").lower()
    return counterparts().get(plain) or counterparts().get(plain.rpartition(".")[2])


def _read(owner: str, value: Any) -> Counterpart:
    if isinstance(value, list):
        return Counterpart(owner, value[0], str(value[1]))
    return Counterpart(owner, None, value) if " " in value else Counterpart(owner, value, "")
