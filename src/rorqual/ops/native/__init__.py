"""The C++ kernels and what loads them."""

from rorqual.ops.native.library import ABI, BAD_VALUE, KINDS, level, library

__all__ = ["ABI", "BAD_VALUE", "KINDS", "level", "library"]
