"""Hash many rows at once: SHA-256 by the OpenSSL that Python has loaded, without Python's lock.

hashlib keeps the lock while it hashes a short text: a loop over the rows of a drain held up every
other thread of the worker for a tenth of a second a batch (ADR 0028).
"""

import ctypes
import hashlib
import itertools
from collections.abc import Callable

import llvmlite.binding
import numba
import numpy as np
from cryptography.hazmat.primitives import hashes
from numba import types

DIGEST_BYTES = 32
_CONTEXT_BYTES = 256  # OpenSSL's SHA256_CTX has 112.
_NAMES = ("SHA256_Init", "SHA256_Update", "SHA256_Final")


def hash_rows(data: np.ndarray, ends: np.ndarray, algorithm: str) -> np.ndarray:
    """Returns uint8[n, 32]: the digests of `data[ends[i]:ends[i + 1]]`, shorter ones followed by 0.

    Args:
      data: uint8, contiguous. ends: int64[n + 1], never falling.
      algorithm: one of `ALGORITHMS`.
    """
    out = np.zeros((len(ends) - 1, DIGEST_BYTES), np.uint8)
    if algorithm == "sha256" and _FOUND:
        _sha256_kernel(data, ends, np.empty(_CONTEXT_BYTES, np.uint8), out)
        return out
    digest = _DIGESTS[algorithm]
    rows = data.tobytes()  # Slices of bytes are cheaper than views.
    for i, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
        found = np.frombuffer(digest(rows[start:end]), np.uint8)
        out[i, : len(found)] = found
    return out


def _sm3(row: bytes) -> bytes:
    state = hashes.Hash(hashes.SM3())
    state.update(row)
    return state.finalize()


# MD5 is for sources that can compute no better.
_DIGESTS: dict[str, Callable[[bytes], bytes]] = {
    "sha256": lambda row: hashlib.sha256(row).digest(),
    "md5": lambda row: hashlib.md5(row).digest(),
    "sm3": _sm3,
}
ALGORITHMS = tuple(_DIGESTS)


def _symbol(name: str) -> str:
    return f"campus_sync_{name}"


# By name, not by address: compiled code is kept on disk, and other processes load it.
_init = types.ExternalFunction(_symbol(_NAMES[0]), types.int32(types.int64))
_update = types.ExternalFunction(
    _symbol(_NAMES[1]), types.int32(types.int64, types.int64, types.int64)
)
_final = types.ExternalFunction(_symbol(_NAMES[2]), types.int32(types.int64, types.int64))


def _agrees(init, update, final) -> bool:
    """Whether the functions give what hashlib does: they are called without its checks."""
    text = bytes(range(200))
    context = ctypes.create_string_buffer(_CONTEXT_BYTES)
    digest = ctypes.create_string_buffer(DIGEST_BYTES)
    done = init(context), update(context, text, ctypes.c_size_t(len(text))), final(digest, context)
    return done == (1, 1, 1) and digest.raw == hashlib.sha256(text).digest()


def _find() -> bool:
    """Whether Python's OpenSSL shows its functions; compiled code finds them from then on."""
    try:
        import _hashlib

        library = ctypes.CDLL(_hashlib.__file__)
        functions = [getattr(library, name) for name in _NAMES]
    except (ImportError, AttributeError, OSError):
        return False  # Python was built without OpenSSL, or around one that it hides.
    if not _agrees(*functions):
        return False
    for name, function in zip(_NAMES, functions, strict=True):
        address = ctypes.cast(function, ctypes.c_void_p).value
        llvmlite.binding.add_symbol(_symbol(name), address)
    return True


_FOUND = _find()


@numba.njit(nogil=True, cache=True)
def _sha256_kernel(data, ends, context, out):
    rows, state = np.int64(data.ctypes.data), np.int64(context.ctypes.data)
    digest = np.int64(out.ctypes.data)
    for i in range(len(ends) - 1):
        _init(state)
        _update(state, rows + ends[i], ends[i + 1] - ends[i])
        _final(digest + DIGEST_BYTES * i, state)
