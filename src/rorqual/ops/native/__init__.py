"""The C++ kernels and what loads them."""

from rorqual.ops.native.library import KINDS, level, library

__all__ = ["KINDS", "level", "library"]
