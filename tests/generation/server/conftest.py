"""Fixtures of the server's tests."""

from __future__ import annotations

from served_models import client, gated

__all__ = ["client", "gated"]
