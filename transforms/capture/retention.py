"""How long the source will still keep the log that a link needs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Retention:
    """What a source keeps of its log, as seen from a link's position.

    Attributes:
      expire_s: age at which a log file is removed; None if age removes none.
      behind_s: age of the oldest change that the link has not applied; 0 if there is none.
      size_max: bytes of log that are kept in all; None if size removes none.
      needed_bytes: log from the beginning of the link's file on.
      bytes_per_s: at which the log grows now.
    """

    expire_s: float | None
    behind_s: float
    size_max: int | None
    needed_bytes: int
    bytes_per_s: float


def seconds_left(retention: Retention) -> float | None:
    """Returns the seconds until log that the link needs may be removed if it stands still.

    None: nothing removes it. 0: it may be gone any moment. A file goes when it is as old as
    `expire_s`, counted from its last change, which is never older than the link's position;
    or when it and all that follows exceed `size_max`.
    """
    left = []
    if retention.expire_s is not None:
        left.append(retention.expire_s - retention.behind_s)
    if retention.size_max is not None:
        spare = retention.size_max - retention.needed_bytes
        if spare <= 0:
            left.append(0.0)
        elif retention.bytes_per_s > 0:
            left.append(spare / retention.bytes_per_s)
    return max(0.0, min(left)) if left else None
