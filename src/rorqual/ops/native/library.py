"""The package's C++ kernels for CPUs (`rorqual_native.h`), called without Python's lock.

They are built with the package where there is a compiler. One library holds code for AVX-512 (with
VNNI and BF16), for AVX2 and for any processor, and chooses when it is loaded; RORQUAL_CPU=avx2 or
portable in the environment makes it choose less.
"""

from __future__ import annotations

import ctypes
import os
import sysconfig
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch

from rorqual.log import logger
from rorqual.ops.native.structs import LAYER_SIGNATURES

ABI = 8
KINDS = {"BF16": 0, "Q8_0": 1, "Q4_K": 2, "Q6_K": 3, "F32": 4}
"""The stacks that the kernels serve, by GGUF's type."""
LEVELS = ("avx512", "avx2", "portable")
BAD_VALUE = 4  # a status: a value is not finite, or too large for the type

log = logger("ops")

_MATRIX = [c_int, c_void_p, c_void_p, c_int64, c_int64]
_SIGNATURES = {
    "rq_abi": (c_int, []),
    "rq_level": (c_char_p, []),
    "rq_set_threads": (None, [c_int]),
    "rq_use_openmp": (None, [c_void_p] * 3),
    "rq_packed_bytes": (c_size_t, [c_int, c_int64, c_int64]),
    "rq_pack": (c_int, _MATRIX),
    "rq_unpack": (c_int, _MATRIX),
    "rq_decode": (c_int, _MATRIX),
    "rq_decode_rows": (c_int, [c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p]),
    "rq_grouped": (
        c_int,
        [c_int, c_void_p, *[c_int64] * 3, c_void_p, c_void_p, POINTER(c_int64), c_int],
    ),
    "rq_train": (c_int, [c_int, c_void_p, c_int64]),
    "rq_encode": (c_int, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_void_p]),
}


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None where it was not built: who names its kernels is told then that
    they serve nothing here.
    """
    path = Path(__file__).parent / f"kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        log.debug("the C++ kernels were not built: no compiler at installation")
        return None
    loaded = ctypes.CDLL(str(path))
    if loaded.rq_abi() != ABI:
        log.warning("the C++ kernels are of another version (pip install again): torch computes")
        return None
    asked = os.environ.get("RORQUAL_CPU", "")
    if asked not in ("", *LEVELS):
        log.warning("RORQUAL_CPU=%s is unknown, so it is not heeded: %s", asked, ", ".join(LEVELS))
    for name, (result, arguments) in (_SIGNATURES | LAYER_SIGNATURES).items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    _share_threads(loaded)
    return loaded


def _share_threads(loaded: ctypes.CDLL) -> None:
    """Torch's threads for the kernels too, where they are libgomp's."""
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    if len(found) == 1:
        gomp = ctypes.CDLL(str(found[0]))
        names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
        loaded.rq_use_openmp(*(ctypes.cast(getattr(gomp, name), c_void_p) for name in names))


def level() -> str | None:
    """The instruction set that was chosen: avx512, avx2 or portable."""
    loaded = library()
    return None if loaded is None else loaded.rq_level().decode()
