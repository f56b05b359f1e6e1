"""netloom gives Apache CloudStack its guest networks on plain Linux hosts."""

__version__ = "0.1.0"
