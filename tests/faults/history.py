"""Check a copy by its history: unique appends to a row show lost, undone and revived writes."""

import dataclasses
import random
import threading
import typing
from collections.abc import Callable, Iterable

import psycopg

FIRST_DOCUMENT = 9_000_000_000_000  # Beyond what the traffic writes.
PATIENTS = ("H0", "H1", "H2", "H3")
_PAUSE_S = 0.02
_URGENT = (
    "INSERT INTO lis.result (result_id, mrn, loinc, val_num, unit, status, result_at, updated_at)"
    " VALUES (gen_random_uuid(), %s, '2823-3', 8.1, 'mmol/L', 'final', now(), now())"
)
_CREATE = (
    "INSERT INTO emr.document (doc_id, mrn, status, content, updated_at)"
    " VALUES (%s, %s, 'draft', %s, now()) ON CONFLICT (doc_id) DO NOTHING"
)
_APPEND = (
    "UPDATE emr.document SET content = content || %s, updated_at = now() WHERE doc_id = %s"
    " RETURNING content"
)
_STATES = (
    "SELECT record_id, content, deleted FROM consult.emr_document"
    f" WHERE record_id LIKE '{FIRST_DOCUMENT // 10**6}______'"
)


class State(typing.NamedTuple):
    """What a row showed: which life of it, the appends to it in order, and whether it was gone."""

    life: int
    appends: tuple[int, ...]
    deleted: bool

    @classmethod
    def read(cls, content: str, deleted: bool) -> "State":
        """Returns the state of a content `life,append,append..`."""
        life, *appends = map(int, content.split(","))
        return cls(life, tuple(appends), deleted)

    @property
    def rank(self) -> tuple[int, int, bool]:
        """A row's states in the source's order: lives, in each its appends, at last its end."""
        return self.life, len(self.appends), self.deleted


@dataclasses.dataclass(frozen=True)
class Fault:
    """Two states of a row of which the later one contradicts the earlier one."""

    kind: str
    row: str
    before: State
    after: State


def fault_between(row: str, before: State, after: State) -> Fault | None:
    """Returns what is wrong with seeing `after` later than `before`, or None."""
    if after.life == before.life:
        shorter, longer = sorted([before.appends, after.appends], key=len)
        if longer[: len(shorter)] != shorter:
            return Fault("lost update", row, before, after)
    if before.deleted and not after.deleted and after.life <= before.life:
        return Fault("resurrection", row, before, after)
    if after.rank < before.rank:
        return Fault("going back", row, before, after)
    return None


def final_faults(source: dict[str, State], store: dict[str, State]) -> list[Fault]:
    """Returns rows of a drained store that are not as the source left them."""
    nothing = State(-1, (), True)
    faults = []
    for row in sorted(source.keys() | store.keys()):
        mine, theirs = source.get(row, nothing), store.get(row, nothing)
        gone = mine.deleted and theirs.deleted
        if not gone and mine != theirs:
            kind = "resurrection" if mine.deleted else "lost update"
            faults.append(Fault(kind, row, mine, theirs))
    return faults


def _states(rows: Iterable[tuple]) -> dict[str, State]:
    # A tombstone may have come without its row's content.
    return {row: State.read(content, gone) for row, content, gone in rows if content}


class History(threading.Thread):
    """Appends to some documents of the source while copies are watched, until `finish`.

    Every append has a number of its own; now and then a document is deleted and made again.
    Half of the patients are under emergency, so that both lanes write the same rows.

    Args:
      source: opens a connection of the hospital. stores: open one to each store.
      crashed: asked by store name, returns how often it has crashed: a store that crashed
        may show an earlier state, once, as it has not said yet that it holds the later one.
    """

    def __init__(
        self,
        source: Callable[[], psycopg.Connection],
        stores: dict[str, Callable[[], psycopg.Connection]],
        seed: int,
        crashed: Callable[[str], int] = lambda store: 0,
    ):
        super().__init__(daemon=True)
        self._source, self._stores, self._crashed = source, stores, crashed
        self._chance = random.Random(seed)
        self._stop_asked = threading.Event()
        self._seen_enough = threading.Event()
        self._number = 0
        self._lives: dict[int, int] = {}
        self.faults: list[Fault] = []
        self.appends = self.looks = 0
        self._watchers = [
            threading.Thread(target=self._watch, args=[name, connect], daemon=True)
            for name, connect in stores.items()
        ]

    def start(self) -> None:
        with self._source() as hospital:
            for patient in PATIENTS[::2]:
                hospital.execute(_URGENT, [patient])
        super().start()
        for watcher in self._watchers:
            watcher.start()

    def finish_writing(self) -> None:
        """Ends the appends; the stores are watched on."""
        self._stop_asked.set()
        self.join()

    def close(self) -> None:
        """Ends all threads, after a failure too."""
        self.finish_writing()
        self._seen_enough.set()
        for watcher in self._watchers:
            watcher.join()

    def finish(self) -> list[Fault]:
        """Ends and returns every fault seen, and those of the stores' last state: drain first."""
        self.close()
        query = (
            "SELECT doc_id::text, content, false FROM emr.document WHERE doc_id >= %s"
            " AND doc_id < %s"
        )
        with self._source() as hospital:
            bounds = [FIRST_DOCUMENT, FIRST_DOCUMENT + 10**6]
            source = _states(hospital.execute(query, bounds).fetchall())
        for connect in self._stores.values():
            with connect() as store:
                found = _states(store.execute(_STATES).fetchall())
                self.faults += final_faults(source, found)
        return self.faults

    def run(self) -> None:
        hospital = None
        while not self._stop_asked.wait(_PAUSE_S * self._chance.random()):
            try:
                if hospital is None:
                    hospital = self._source()
                self._change(hospital)
            except psycopg.Error:
                hospital = None  # Whether the change happened, the source itself will say.
        if hospital is not None:
            hospital.close()

    def _change(self, hospital: psycopg.Connection) -> None:
        document = FIRST_DOCUMENT + self._chance.randrange(12)
        if self._chance.random() < 0.06:
            hospital.execute("DELETE FROM emr.document WHERE doc_id = %s", [document])
            return
        self._number += 1
        found = hospital.execute(_APPEND, [f",{self._number}", document]).fetchone()
        if found is None:
            life = self._lives[document] = self._lives.get(document, 0) + 1
            patient = PATIENTS[document % len(PATIENTS)]
            hospital.execute(_CREATE, [document, patient, str(life)])
        self.appends += 1

    def _watch(self, name: str, connect: Callable[[], psycopg.Connection]) -> None:
        known: dict[str, State] = {}
        crashes = self._crashed(name)
        store = None
        while not self._seen_enough.is_set():
            try:
                if store is None:
                    store = connect()
                found = _states(store.execute(_STATES).fetchall())
            except psycopg.Error:
                store = None
                self._seen_enough.wait(_PAUSE_S)
                continue
            if self._crashed(name) != crashes:
                crashes, known = self._crashed(name), {}
                continue
            self.looks += 1
            for row, state in found.items():
                if row in known and (fault := fault_between(row, known[row], state)):
                    self.faults.append(fault)
                known[row] = state
            self._seen_enough.wait(_PAUSE_S)
        if store is not None:
            store.close()
