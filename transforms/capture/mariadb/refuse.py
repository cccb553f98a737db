"""Tell of a refused row what the log had, without the mark that had it refused."""

import dataclasses

from schemas.batches import Reject
from transforms.capture.mariadb.charsets import MARK

_MARK = MARK.decode(errors="backslashreplace")


def unmarked(reject: Reject) -> Reject:
    """Returns the reject with its values as they were logged, undecodable bytes escaped."""
    row = {
        name: value.removeprefix(_MARK) if value is not None else None
        for name, value in reject.row.items()
    }
    return dataclasses.replace(reject, row=row)
