"""Names of settings stay: a checkpoint stores its whole configuration, which today's schema has to understand."""

from __future__ import annotations

from pathlib import Path

from megatron_omega.config.arguments import settings

LIST = Path(__file__).with_name("settings.txt")
"""Every setting that any version had, one a line. Lines are added, never removed."""


def test_no_setting_is_lost_or_unlisted() -> None:
    known, listed = {setting.name for setting in settings()}, set(LIST.read_text().split())
    lost, unlisted = sorted(listed - known), sorted(known - listed)
    assert not lost, f"stored configurations have {lost}: keep the names, or let config/history.py translate them"
    assert not unlisted, f"{unlisted} are new: add them to {LIST.name}; from then on the names stay"
