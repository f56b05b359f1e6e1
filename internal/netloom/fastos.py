"""``os`` for modules that every call of CloudStack's loads: the real module if it is loaded already, else a subset.

An interpreter that was started without ``site`` has not loaded ``os``. Loading it, with its abstract base classes,
takes a seventh of a bare start. Its C module ``posix`` is built in, so fastos_posix.py makes the needed subset from
that. Any other attribute is taken from the real module, which is loaded then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING or "os" in sys.modules:
    import os as os
else:
    from netloom import fastos_posix as os

__all__ = ["os"]
