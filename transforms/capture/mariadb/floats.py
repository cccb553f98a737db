"""Write numbers of floating point in the fewest digits that read back the same."""

import numpy as np
import pyarrow as pa


def float_texts(bits: np.ndarray, size: int) -> pa.StringArray:
    """Returns the texts of numbers given as int64 of their bits; `size` is 4 or 8 bytes."""
    if size == 4:
        numbers = bits.astype(np.uint32).view(np.float32)
    else:
        numbers = np.ascontiguousarray(bits).view(np.float64)
    return pa.array(numbers).cast(pa.utf8())
