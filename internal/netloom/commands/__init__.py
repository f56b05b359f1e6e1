"""What a command means: (state, payload) to state, one pure function per command."""

from __future__ import annotations

from netloom.commands.table import TABLE, Row, apply, check_payload, decode
from netloom.commands.transition import Context, Transitioned

__all__ = ["TABLE", "Context", "Row", "Transitioned", "apply", "check_payload", "decode"]
