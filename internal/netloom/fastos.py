"""``os`` for what runs in every call of CloudStack's: the module where it is loaded, else as much as a call needs.

An interpreter that was started without site has no ``os`` yet, and loading it, with its abstract base classes, takes a
seventh of a bare start. What is behind it is there: the C module ``posix``. Whatever else is asked for comes from the
whole module, loaded then.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING or "os" in sys.modules:
    import os as os
else:
    from netloom import fastos_posix as os

__all__ = ["os"]
