"""The effect of each command: one pure function per command, from a scope and a payload to the new scope."""

from __future__ import annotations

from netloom.commands.table import TABLE, Row, apply, check_payload, decode
from netloom.commands.transition import Context, Transitioned

__all__ = ["TABLE", "Context", "Row", "Transitioned", "apply", "check_payload", "decode"]
