"""Know the events that a connector sends again after a restart (docs/adr/0013)."""

import typing

from transforms.capture.debezium.record import Source

TRANSACTIONS_KEPT = 100_000
_EVENTS_KEPT = 100_000


class Place(typing.NamedTuple):
    """Where an event stands in its source's log.

    Attributes:
      transaction: identifies the source's transaction, also on another server of a cluster.
      stream: what commits in one order: a redo thread, a GTID domain, a server.
      commit: the transaction's place in that order, or None if the source does not tell.
      origin: whose `step` it is; steps of two origins cannot be compared.
      step: the event's place in the transaction, or None.
      ordered: whether steps never go back within a transaction, so that a lower one was seen.
      unique: whether (step, operation, row) names one change, so that an equal one was seen.
    """

    transaction: tuple
    stream: str
    commit: typing.Any
    origin: typing.Any
    step: tuple | None
    ordered: bool
    unique: bool


def place_of(source: Source) -> Place | None:
    """Returns the event's place, or None if its source tells none: such an event is never known."""
    maker = _PLACES.get(source.connector)
    return maker(source) if maker is not None else None


def _postgresql(source: Source) -> Place | None:
    if source.txId is None or source.lsn is None:
        return None
    # Numbers of transactions come again, after a failover even at once; with the commit time
    # they do not. The rows of one COPY share one LSN, each row once (trap 4).
    transaction = (source.txId, source.ts_us or source.ts_ms)
    return Place(transaction, "", None, None, (source.lsn,), True, True)


def _binlog(source: Source) -> Place | None:
    if source.file is None or source.pos is None:
        return None
    # `pos` is the event's on one version and its transaction's on another, `row` counts from 0
    # in every statement: only a lower `pos` tells something.
    step = (source.pos,)
    if source.gtid:
        stream, _, number = source.gtid.replace("-", ":").rpartition(":")
        domain = stream.partition(":")[0] if "-" in source.gtid[:11] else stream
        commit = int(number) if number.isdigit() else None
        return Place((source.gtid,), domain, commit, source.server_id, step, True, False)
    name, _, number = source.file.rpartition(".")
    commit = int(number) if number.isdigit() else None
    stream = f"{source.server_id} {name}"
    return Place((stream, source.file), stream, commit, source.server_id, step, True, False)


def _oracle(source: Source) -> Place | None:
    if source.commit_scn is None or source.txId is None:
        return None
    # Two nodes of a cluster commit each in its own order: one order a redo thread.
    transaction = (source.txId, source.commit_scn)
    stream = str(source.redo_thread)
    commit = int(source.commit_scn) if str(source.commit_scn).isdigit() else None
    if source.txSeq is not None:
        return Place(transaction, stream, commit, None, (source.txSeq,), True, True)
    step = (source.scn, source.rs_id, source.ssn)
    return Place(transaction, stream, commit, None, step, False, source.rs_id is not None)


def _sqlserver(source: Source) -> Place | None:
    if source.commit_lsn is None or source.change_lsn is None:
        return None
    # Of one width, so that their texts compare as they do. Within a commit the change LSN may
    # go back.
    step = (source.change_lsn, source.event_serial_no)
    commit = source.commit_lsn
    return Place((commit,), str(source.db), commit, None, step, False, True)


_PLACES = {
    "postgresql": _postgresql,
    "mysql": _binlog,
    "mariadb": _binlog,
    "oracle": _oracle,
    "sqlserver": _sqlserver,
}


class Replays:
    """Remembers what was seen of a source's log, so that what comes again is known.

    A connector that was killed goes on from the offsets that it last stored: it sends a stretch
    of its log again, in order, up to where it was and on. What is certainly of that stretch is a
    replay: an event of a transaction that is not the last one seen, and of the last one an
    event at a place that was passed. What cannot be told apart is not called a replay: taking
    an event twice is mended by those that follow it in the same transaction, leaving one out
    by nothing.

    Attributes:
      rewinds: times that the source's log went back to what is not remembered: another server
        took over without its last changes, or a replay goes back beyond memory. Everything is
        then forgotten, so that all that follows is taken in its order.
    """

    def __init__(self, transactions: int = TRANSACTIONS_KEPT):
        self.rewinds = 0
        self._kept = transactions
        self.forget()

    def forget(self) -> None:
        """Starts anew: with a whole snapshot, nothing from before it matters."""
        self._transactions: set[tuple] = set()
        self._older: set[tuple] = set()
        self._high: dict[str, typing.Any] = {}
        self._last: Place | None = None
        self._steps: set[tuple] = set()
        self._older_steps: set[tuple] = set()

    def seen(self, place: Place, change: tuple) -> bool:
        """Whether the event is a replay; if not, it is remembered.

        Args:
          change: operation, table and key: which of the changes at one step it is.
        """
        last = self._last
        if last is not None and place.transaction == last.transaction:
            if place.origin == last.origin:
                return self._seen_step(place, change)
        elif place.transaction in self._transactions or place.transaction in self._older:
            return True
        elif place.commit is not None:
            high = self._high.get(place.stream)
            if high is not None and place.commit < high:
                self.rewinds += 1
                self.forget()
            self._high[place.stream] = place.commit
        if len(self._transactions) >= self._kept:
            self._older, self._transactions = self._transactions, set()
        self._transactions.add(place.transaction)
        self._last = place
        self._steps, self._older_steps = {(place.step, change)}, set()
        return False

    def knows(self, name: str) -> bool:
        """Whether a transaction of this name has been seen, where its events have it as GTID."""
        return (name,) in self._transactions or (name,) in self._older

    def close(self, name: str) -> None:
        """Takes note that a transaction has come whole: all that comes of it now is a replay.

        Its name is known to events where it is their GTID, and only they need it: the end may
        itself be a replay, of another transaction than the last one seen.
        """
        if self._last is not None and self._last.transaction == (name,):
            self._last = None

    def _seen_step(self, place: Place, change: tuple) -> bool:
        if place.ordered:
            if place.step < self._last.step:
                return True
            if place.step > self._last.step:
                self._last = place
                self._steps = set()
        if not place.unique:
            return False
        step = (place.step, change)
        if step in self._steps or step in self._older_steps:
            return True
        if len(self._steps) >= _EVENTS_KEPT:
            self._older_steps, self._steps = self._steps, set()
        self._steps.add(step)
        return False
