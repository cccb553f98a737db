"""Carry emergencies out of a link's log while its snapshot is still being read (ADR 0024)."""

import logging
import threading
import typing
from collections.abc import Callable, Iterable

import psycopg

from schemas.batches import RawChanges
from schemas.errors import CampusSyncError, told
from schemas.positions import Position
from transforms.capture.interpret import Interpreted, Interpreter
from transforms.capture.source_log import SourceLog
from transforms.escalations import Change
from transforms.harmonise.lookups import Lookups

_LOGGER = logging.getLogger(__name__)

_WAIT_S = 0.25
_AGAIN_S = 5.0


class ExpressReading:
    """A reading of the log beside a snapshot, of which only what is urgent is handed on.

    Nothing of it counts as read: the routine lane reads the same stretch again, behind the
    snapshot, so that what this one missed comes then at the latest. Rows that find their patient
    by a parent are provisional, as not all parents can be known yet. A context manager; inside
    it a thread reads.

    Args:
      link: for messages. log: the link's source.
      begin: where the snapshot stands. acknowledged_lsn: where the slot stands, and stays.
      interpreter, parents: of this reading alone.
      hand_on: takes each stretch, in order. has_room: whether it can take more.
    """

    def __init__(
        self,
        link: str,
        log: SourceLog,
        begin: Position,
        acknowledged_lsn: int,
        interpreter: Interpreter,
        parents: Lookups | None,
        hand_on: Callable[[Interpreted], None],
        has_room: Callable[[], bool],
    ):
        self._link, self._log = link, log
        self._read_to, self._acknowledged_lsn = begin, acknowledged_lsn
        self._interpreter, self._parents = interpreter, parents
        self._hand_on, self._has_room = hand_on, has_room
        self._learned: list[Change] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"express {link}", daemon=True)

    def __enter__(self) -> typing.Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def learn(self, changes: Iterable[Change]) -> None:
        """Takes over whose emergencies the snapshot's rows open or close."""
        with self._lock:
            self._learned += changes

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._read()
            except (CampusSyncError, psycopg.Error) as error:
                # Whatever it is, the link meets it too when it comes here, and knows what to do.
                _LOGGER.warning("link %s, beside its snapshot: %s", self._link, told(error))
                self._stopping.wait(_AGAIN_S)

    def _read(self) -> None:
        with self._log.open(self._read_to, self._acknowledged_lsn) as stream:
            while not self._stopping.is_set():
                for raw in stream.read(_WAIT_S).taken:
                    self._hand_on(self._interpreted(raw))
                    self._read_to = raw.end
                while not self._has_room() and not self._stopping.wait(_WAIT_S):
                    stream.keep_alive()

    def _interpreted(self, raw: RawChanges) -> Interpreted:
        with self._lock:
            learned, self._learned = self._learned, []
        self._interpreter.learn(learned)
        if self._parents is None:
            return self._interpreter.interpret(raw, self._read_to)
        self._parents.doubt()  # Who was not in the store may be by now.
        return self._interpreter.interpret(raw, self._read_to).provisional()
