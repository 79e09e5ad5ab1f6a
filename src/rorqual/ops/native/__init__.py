"""The C++ kernels and what loads them."""

from rorqual.ops.native.library import FORMS, KINDS, level, library

__all__ = ["FORMS", "KINDS", "level", "library"]
