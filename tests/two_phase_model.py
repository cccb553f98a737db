"""Stores and a log in memory that keep what a crash leaves, for every interleaving of crashes."""

import dataclasses

from schemas.errors import StoreUnavailable
from transforms.two_phase.branches import BranchDown, BranchRefused, Settled
from transforms.two_phase.decision_log import Logged
from transforms.two_phase.states import Event, Identity, State, TransactionId, Xid, follow


class ModelStore:
    """A server: its committed rows and what it holds prepared survive a crash, sessions do not."""

    def __init__(self, name: str):
        self.name = name
        self.rows: dict[str, int] = {}
        self.held: dict[Xid, dict[str, int]] = {}
        self.up = True
        self.refuses = False
        self.prepares_then_dies = False
        self.life = 0  # Another one behind each crash: sessions of before are gone.

    def crash(self) -> None:
        self.up = False
        self.life += 1

    def start(self) -> None:
        self.up = True

    def fail_over(self) -> None:
        """Goes on as a standby that lacks what was prepared last."""
        self.crash()
        self.held.clear()
        self.start()


class ModelBranch:
    """A client's session at a `ModelStore`, as a `Branch`."""

    def __init__(self, store: ModelStore):
        self.name, self._store = store.name, store
        self._open: dict[str, int] | None = None
        self._xid: Xid | None = None
        self._life = store.life

    def begin(self, xid, seconds):
        self._reach(fresh=True)
        self._open, self._xid = {}, xid

    def write(self, writes):
        self._reach()
        if self._store.refuses:
            raise BranchRefused(self.name)
        if self._locked():
            raise BranchDown(self.name)
        self._open |= _content(writes)

    def prepare(self):
        self._reach()
        self._store.held[self._xid] = self._open
        self._open = None
        if self._store.prepares_then_dies:
            self._store.crash()
            raise BranchDown(self.name)

    def settle(self, xid, commit):
        self._reach(fresh=True)
        rows = self._store.held.pop(xid, None)
        if rows is None:
            return Settled.UNKNOWN
        if commit:
            self._store.rows |= rows
        return Settled.DONE

    def prepared(self, coordinator):
        self._reach(fresh=True)
        return sorted(xid for xid in self._store.held if xid.coordinator == coordinator)

    def apply(self, writes):
        self._reach(fresh=True)
        if self._locked():
            raise BranchDown(self.name)
        self._store.rows |= _content(writes)

    def close(self):
        self._open = None

    def _locked(self) -> bool:
        return bool(self._store.held)

    def _reach(self, fresh: bool = False) -> None:
        if not self._store.up:
            raise BranchDown(self.name)
        if fresh:
            self._life = self._store.life
        elif self._life != self._store.life or self._open is None:
            raise BranchDown(self.name)


class ModelLog:
    """A `DecisionLog` in memory, over the same rules of what follows what."""

    def __init__(self):
        self.up = True
        self.here = Identity("coordinator", 1, 0)
        self.rows: dict[TransactionId, Logged] = {}
        self.late: set[TransactionId] = set()

    def pass_deadline(self) -> None:
        self.late |= self.rows.keys()

    def identity(self):
        self._reach()
        return self.here

    def begin(self, branches, seconds):
        self._reach()
        self.here = self.here._replace(last=self.here.last + 1)
        found = TransactionId(self.here.timeline, self.here.last, f"{self.here.last:08x}")
        states = dict.fromkeys(branches, "asked")
        self.rows[found] = Logged(found, State.PREPARING, "", [], 0, 0, 0.0, False, states)
        return self.here, found

    def decide(self, transaction, event, reason="", missing=(), content=()):
        self._reach()
        one = self.rows.get(transaction)
        if one is None:
            return State.HELD
        wants = event in (Event.WANT_COMMIT, Event.WANT_ABORT)
        after = follow(one.state, Event.DEADLINE if wants and transaction in self.late else event)
        if after is not one.state:
            branches = one.branches
            if after is State.COMMIT:
                branches = {n: "missing" if n in missing else s for n, s in branches.items()}
            self.rows[transaction] = dataclasses.replace(
                one, state=after, reason=reason, content=list(content), branches=branches
            )
        return after

    def expire(self, here):
        self._reach()
        for found in [one.id for one in self.rows.values() if one.id in self.late]:
            ours = found.timeline == here.timeline
            self.decide(found, Event.DEADLINE if ours else Event.LOG_WENT_BACK)

    def state_of(self, transaction):
        self._reach()
        one = self.rows.get(transaction)
        return one and one.state

    def issued_again(self, transaction):
        self._reach()
        return any(found[:2] == transaction[:2] and found != transaction for found in self.rows)

    def hold(self, transaction, branch):
        self._reach()
        new = Logged(transaction, State.HELD, "", [], 0, 0, 0.0, True, {})
        self.rows.setdefault(transaction, new).branches.setdefault(branch, "asked")

    def presume_abort(self):
        for one in self.unfinished():
            if one.state is State.HELD:
                self.decide(one.id, Event.PRESUME_ABORT)

    def note_done(self, transaction, branches):
        self._reach()
        one = self.rows[transaction]
        states = one.branches | dict.fromkeys(branches, "done")
        state = one.state
        if set(states.values()) == {"done"}:
            state = follow(state, Event.ALL_DONE)
        self.rows[transaction] = dataclasses.replace(one, branches=states, state=state)

    def forget(self):
        self._reach()

    def unfinished(self):
        self._reach()
        ends = (State.COMMITTED, State.ABORTED)
        return [_copy(one) for one in self.rows.values() if one.state not in ends]

    def _reach(self) -> None:
        if not self.up:
            raise StoreUnavailable("log")


def _copy(one: Logged) -> Logged:
    return dataclasses.replace(one, branches=dict(one.branches))


def _content(writes) -> dict[str, int]:
    return {row["record_id"]: row["src_lsn"] for write in writes for row in write.rows}
