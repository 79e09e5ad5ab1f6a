"""The C++ kernels and what loads them."""

from rorqual.ops.native.library import BAD_VALUE, KINDS, level, library

__all__ = ["BAD_VALUE", "KINDS", "level", "library"]
