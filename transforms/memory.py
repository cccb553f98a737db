"""Loads, stores and copies at addresses, for compiled kernels over Arrow buffers.

One kernel then serves every table, whatever its columns, and pays for no index check: the caller
answers for the bounds. Addresses and sizes are signed 64-bit (unsigned ones would turn into
floats when added to offsets), values little-endian and not necessarily aligned.
"""

import sys

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

if sys.byteorder != "little":
    raise ImportError("campus-sync needs a little-endian machine")


def _loader(kind):
    @intrinsic
    def load(typing_context, address):
        def generate(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], context.get_value_type(kind).as_pointer())
            return builder.load(pointer, align=1)

        return kind(types.int64), generate

    return load


def _storer(kind):
    @intrinsic
    def store(typing_context, address, value):
        def generate(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], context.get_value_type(kind).as_pointer())
            builder.store(args[1], pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, kind), generate

    return store


@intrinsic
def copy(typing_context, target, source, size):
    """Copies `size` bytes between two addresses that do not overlap."""

    def generate(context, builder, signature, args):
        byte = context.get_value_type(types.uint8).as_pointer()
        target, source = (builder.inttoptr(arg, byte) for arg in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


load_u8, load_u16 = _loader(types.uint8), _loader(types.uint16)
load_i32, load_i64, load_u64 = _loader(types.int32), _loader(types.int64), _loader(types.uint64)
store_u8, store_u16 = _storer(types.uint8), _storer(types.uint16)
store_i32, store_i64 = _storer(types.int32), _storer(types.int64)
