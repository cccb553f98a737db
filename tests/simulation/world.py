"""Stores, clients, a hospital system and a network, moved by a seed over the real merge code."""

import dataclasses
import functools
import heapq
import itertools
import random
import typing

from schemas.batches import Lane
from schemas.conflict_policy import ConflictRules, TablePolicy, load_conflict_rules
from schemas.hlc import HybridClock, stamp_of, us_of
from schemas.siblings import DELETED, ROW, UNSEEN, Record, Stamp
from schemas.versions import EMPTY, Dot, VersionVector, store_actor
from tests.simulation import history as h
from transforms.conflicts.edit import edit_record, source_record
from transforms.conflicts.join import join_records
from transforms.conflicts.show import Shown, elements_of, show
from transforms.conflicts.tombstones import forget, may_forget

SECOND = 1_000_000
OUTAGE_US = 6 * 3600 * SECOND  # The longest outage, here: a run is some hours long.
# The group's column that a client writes; other groups of these tables are left alone.
COLUMNS = {
    "treatment_plan": {
        "plan": "content",
        "participants": "participants",
        "follow_up": "follow_up",
        "number": "visit_no",
    },
    "consultation": {"opinion": "opinion", "status": "status", "answered_at": "answered_at"},
    "patient": {
        "identity": "name",
        "blood": "abo",
        "phone": "phone",
        "allergies": "allergies",
        "upkeep": "remarks",
    },
}
UNIONS = {"participants", "allergies"}
STATES = ("requested", "arrived", "answered", "signed_off")
ROLES = ("superior", "attending", "attending", "consultant", "consultant", "trainee", "")
NONE = "无"
_PAUSES_S = (0, 0.05, 1, 30, 200, 400, 3000)
_DELAYS_S = (0.01, 0.2, 2, 60, 600, 5000)
_SKEWS_S = (0, 0, 0, 0, 0, 0, 3600, -3600)


def _times(**kinds: int) -> tuple[str, ...]:
    return tuple(kind for kind, n in kinds.items() for _ in range(n))


# What happens how often, the shape of the network, and among how many stores. Most runs are of
# everything; in some, records die and stores go back to backups that still hold them.
_EVERYTHING = _times(
    edit=22, decide=5, delete=2, source=4, sweep=2, cut=2, heal=2,
    crash=1, backup=1, restore=1, jump=1, sync=1,
)  # fmt: skip
_GRAVES = _times(edit=5, decide=2, delete=5, sweep=8, sync=6, backup=3, restore=3, source=1)
_THEMES = (
    *[(_EVERYTHING, ("mesh", "mesh", "ring", "chain"), (2, 3, 4, 5))] * 5,
    (_GRAVES, ("mesh",), (2, 3)),
)


@functools.cache
def simulated_rules() -> ConflictRules:
    """The packaged policies, with an outage that a run can outlast."""
    return dataclasses.replace(load_conflict_rules(), longest_outage_us=OUTAGE_US)


class Merge:
    """The code under test; mutants override a part of it."""

    rules = property(lambda self: simulated_rules())

    def join(self, held: Record, arriving: Record, table: TablePolicy) -> Record:
        return join_records(held, arriving)

    def edit(self, record: Record, actor: str, stamp: Stamp, changed, table, **how) -> Record:
        return edit_record(record, actor, stamp, changed, table, self.rules, **how)

    def show(self, record: Record, table: TablePolicy) -> Shown:
        return show(record, table, self.rules)

    def may_forget(self, record: Record, table: TablePolicy, acknowledged, now_us: int) -> bool:
        return may_forget(record, table, self.rules, acknowledged, now_us)

    def forget(self, record: Record, actor: str, stamp: Stamp) -> Record:
        return forget(record, actor, stamp)

    def incarnation(self, starts: int) -> str:
        return str(starts)

    def clock(self, wall_us, latest: int) -> HybridClock:
        return HybridClock(wall_us, self.rules.skew_bound_us, latest)


class Step(typing.NamedTuple):
    """One thing that somebody does, wholly given by its numbers: a run with steps left out is
    a run."""

    pause_s: float
    kind: str
    store: int
    record: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will happen."""

    seed: int
    stores: int
    shape: str
    skews_us: tuple[int, ...]
    keys: tuple[h.Key, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, seed: int, stores: int | None = None, steps: int = 34) -> "Plan":
        """Returns the plan of a seed."""
        rng = random.Random(seed)
        kinds, shapes, counts = rng.choice(_THEMES)
        count = stores or rng.choice(counts)
        tables = rng.sample(sorted(COLUMNS), rng.randint(1, 2))
        return cls(
            seed,
            count,
            rng.choice(shapes),
            tuple(rng.choice(_SKEWS_S) * SECOND + rng.randrange(200_000) for _ in range(count)),
            tuple((table, f"{table}/{i}") for i, table in enumerate(tables)),
            tuple(
                Step(
                    rng.choice(_PAUSES_S),
                    rng.choice(kinds),
                    rng.randrange(count),
                    rng.randrange(len(tables)),
                    rng.getrandbits(32),
                )
                for _ in range(steps)
            ),
        )

    def without(self, start: int, end: int) -> "Plan":
        """Returns the plan without the steps from `start` to before `end`."""
        return dataclasses.replace(self, steps=self.steps[:start] + self.steps[end:])


class Store:
    """One consult store: what is durable, its backup, and what a crash takes."""

    def __init__(self, name: str, neighbours: list[str]):
        self.name, self.neighbours = name, neighbours
        self.records: dict[h.Key, Record] = {}
        self.latest = 0
        self.backup: tuple[dict[h.Key, Record], int] = ({}, 0)
        self.acknowledged: dict[tuple[str, h.Key], VersionVector] = {}
        self.starts = 0
        self.actor = ""
        self.clock: HybridClock
        self.skew_us = 0


class World:
    """Runs a plan and notes its history.

    Attributes:
      events: what happened. vectors: store and key to what the record has seen, at the end.
    """

    def __init__(self, plan: Plan, merge: Merge | None = None):
        self.plan, self.merge = plan, merge or Merge()
        self.tables = self.merge.rules.tables
        self.events: list[h.Event] = []
        self.now_us = 1_800_000_000 * SECOND
        self.rng = random.Random(plan.seed ^ 0x5EED)
        self.queue: list[tuple[int, int, typing.Callable[[], None]]] = []
        self.count = itertools.count()
        self.names = [f"s{i}" for i in range(plan.stores)]
        self.stores = {name: Store(name, self._neighbours(i)) for i, name in enumerate(self.names)}
        self.cuts: set[frozenset[str]] = set()
        self.source: dict[h.Key, list[tuple[Dot, Stamp, dict]]] = {}
        self.deliveries = 0
        for store, skew_us in zip(self.stores.values(), plan.skews_us, strict=True):
            store.skew_us = skew_us
            self._start(store)

    def run(self) -> "World":
        """Plays all steps, then lets everything arrive, and looks at every store."""
        for step in self.plan.steps:
            self._pass(round(step.pause_s * SECOND))
            store = self.stores[self.names[step.store]]
            key = self.plan.keys[step.record]
            getattr(self, f"_{step.kind}")(store, key, random.Random(step.seed))
        self._settle()
        for store in self.stores.values():
            for key in self.plan.keys:
                self._look(store, key, final=True)
        return self

    def _neighbours(self, i: int) -> list[str]:
        n = self.plan.stores
        if self.plan.shape == "mesh":
            return [name for j, name in enumerate(self.names) if j != i]
        near = {i - 1, i + 1}
        if self.plan.shape == "ring":
            near = {j % n for j in near}
        return [self.names[j] for j in sorted(near - {i}) if 0 <= j < n]

    def _start(self, store: Store) -> None:
        store.starts += 1
        store.actor = store_actor(store.name, self.merge.incarnation(store.starts))
        store.clock = self.merge.clock(lambda: self._wall_us(store), store.latest)

    def _wall_us(self, store: Store) -> int:
        return self.now_us + store.skew_us

    # Time and network.

    def _at(self, delay_us: int, action: typing.Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now_us + delay_us, next(self.count), action))

    def _pass(self, duration_us: int) -> None:
        end = self.now_us + duration_us
        while self.queue and self.queue[0][0] <= end:
            at, _, action = heapq.heappop(self.queue)
            self.now_us = max(self.now_us, at)
            action()
        self.now_us = end

    def _delay_us(self) -> int:
        return round(self.rng.choice(_DELAYS_S) * SECOND * self.rng.random())

    def _send(self, store: Store, key: h.Key, to: list[str], sure: bool = False) -> None:
        if key not in store.records:
            return
        number = next(self.count)
        self.events.append(h.Sent(number, store.name, key))
        record, starts = store.records[key], store.starts
        for name in to:
            lost = frozenset((store.name, name)) in self.cuts or self.rng.random() < 0.1
            if lost and not sure:
                continue
            for _ in range(2 if self.rng.random() < 0.15 else 1):
                arrive = functools.partial(self._arrive, number, store, name, key, record, starts)
                self._at(0 if sure else self._delay_us(), arrive)

    def _arrive(
        self, number: int, sender: Store, name: str, key: h.Key, record: Record, starts: int
    ) -> None:
        # What a crashed sender had not yet handed over is lost, half of the time.
        if sender.starts != starts and number % 2:
            return
        store = self.stores[name]
        self.deliveries += 1
        self.events.append(h.Arrived(number, name, self._wall_us(store)))
        store.acknowledged[sender.name, key] = record.seen
        self._take(store, key, record)

    def _take(self, store: Store, key: h.Key, record: Record) -> None:
        held = store.records.get(key, UNSEEN)
        met = {(e.stamp.hlc, dot.actor) for es in record.live.values() for dot, e in es.items()}
        for stamp, actor in sorted(met):
            store.clock.witness(stamp, actor)
        store.latest = store.clock.latest
        joined = self.merge.join(held, record, self.tables[key[0]])
        if joined is not held:
            store.records[key] = joined
            self._send(store, key, store.neighbours)

    def _settle(self) -> None:
        """Heals the network, then passes records along the links until nobody learns anything."""
        self.cuts.clear()
        self._pass(10_000 * SECOND)
        for key, versions in self.source.items():
            for store in self.stores.values():
                self._feed(store, key, len(versions))
        for _ in range(len(self.names) + 1):
            for store in self.stores.values():
                for key in self.plan.keys:
                    self._send(store, key, store.neighbours, sure=True)
            self._pass(10_000 * SECOND)
        assert self.deliveries < 20_000, f"seed {self.plan.seed}: records go in circles"

    # What clients see and do.

    def _look(self, store: Store, key: h.Key, final: bool = False) -> tuple[int, Shown]:
        shown = self.merge.show(store.records.get(key, UNSEEN), self.tables[key[0]])
        columns = COLUMNS[key[0]] | {ROW: DELETED}
        groups = {}
        for group, column in columns.items():
            view = shown.groups[group]
            groups[group] = h.Seen(
                view.values[column],
                frozenset(_writer(e, column) for e in view.entries),
                bool(view.conflict and view.conflict.open),
                view.conflict.drops if view.conflict else (),
            )
        number = next(self.count)
        self.events.append(h.Look(number, store.name, key, shown.deleted, groups, final))
        return number, shown

    def _edit(self, store: Store, key: h.Key, rng: random.Random) -> None:
        """A client opens the form and saves it, at once or some time later."""
        look, shown = self._look(store, key)
        if shown.archived and rng.random() < 0.8:
            return
        name = f"e{next(self.count)}"
        groups = COLUMNS[key[0]]
        if shown.deleted:
            chosen = list(groups)  # A new row names every column.
        else:
            chosen = rng.sample(sorted(groups), rng.choice([1, 1, 2]))
        wrote = {group: self._value(group, groups[group], name, shown, rng) for group in chosen}
        late = rng.random() < 0.3
        how = {"archived": rng.random() < 0.06, "seen": None, "decides": False}
        if late:
            how["seen"] = {group: view.sight for group, view in shown.groups.items()}
        save = functools.partial(self._save, store, key, name, look, wrote, rng, **how)
        starts = store.starts
        if late:
            self._at(self._delay_us(), lambda: self._save_late(store, key, starts, shown, save))
        else:
            save()

    def _save_late(self, store: Store, key: h.Key, starts: int, shown: Shown, save) -> None:
        """A crash closes forms; a store refuses one whose row was deleted or created since."""
        now = self.merge.show(store.records.get(key, UNSEEN), self.tables[key[0]])
        if store.starts == starts and now.deleted == shown.deleted:
            save()

    def _value(self, group: str, column: str, name: str, shown: Shown, rng: random.Random):
        if group == "status":
            return rng.choice(STATES)
        if group not in UNIONS:
            return name
        policy = self.tables["patient" if group == "allergies" else "treatment_plan"]
        elements = elements_of(shown.values[column], policy.by_group[group])
        if elements and rng.random() < 0.25:
            elements.remove(rng.choice(elements))
        if rng.random() < 0.8:
            elements.append(name if rng.random() < 0.85 or group != "allergies" else NONE)
        return frozenset(elements)

    def _decide(self, store: Store, key: h.Key, rng: random.Random) -> None:
        """A person decides all that is open."""
        look, shown = self._look(store, key)
        asked = [conflict.group for conflict in shown.conflicts if conflict.open]
        asked = [group for group in asked if group == ROW or group in COLUMNS[key[0]]]
        if not asked:
            return
        name = f"d{next(self.count)}"
        wrote = {
            group: self._value(group, COLUMNS[key[0]][group], name, shown, rng)
            for group in asked
            if group != ROW
        }
        if ROW in asked:
            wrote[ROW] = rng.random() < 0.5
        seen = {group: shown.groups[group].full_sight for group in asked}
        self._save(store, key, name, look, wrote, rng, seen=seen, decides=True, archived=False)

    def _delete(self, store: Store, key: h.Key, rng: random.Random) -> None:
        look, shown = self._look(store, key)
        if not shown.deleted:
            name = f"x{next(self.count)}"
            how = {"seen": None, "decides": False, "archived": False}
            self._save(store, key, name, look, {ROW: True}, rng, **how)

    def _save(self, store, key, name, look, wrote, rng, *, seen, decides, archived) -> None:
        table = self.tables[key[0]]
        role, urgent = rng.choice(ROLES), rng.random() < 0.25
        distrusted = store.clock.distrusted
        hlc = store.clock.tick()
        store.latest = store.clock.latest
        lane = Lane.EMERGENCY if urgent else Lane.ROUTINE
        stamp = Stamp(hlc, lane, role, name, decides, "", tuple(sorted(distrusted)))
        changed = {}
        for group, value in wrote.items():
            if group != ROW:
                column = COLUMNS[key[0]][group]
                changed[column] = ",".join(sorted(value)) if group in UNIONS else value
        if "plan" in wrote:
            changed["status"] = "archived" if archived else "signed"
        store.records[key] = self.merge.edit(
            store.records.get(key, UNSEEN),
            store.actor,
            stamp,
            changed,
            table,
            deleted=wrote.get(ROW, False),
            seen=seen,
        )
        self.events.append(
            h.Edit(
                name,
                store.name,
                key,
                look,
                {ROW: False} | wrote,
                role,
                urgent,
                us_of(hlc),
                hlc,
                store.actor,
                distrusted,
                decides,
                seen is not None and not decides,
                archived and "plan" in wrote,
                self._wall_us(store),
            )
        )
        self._send(store, key, store.neighbours)

    # What happens to them.

    def _source(self, store: Store, key: h.Key, rng: random.Random) -> None:
        """The hospital's own system changes some columns; each store hears of it by itself."""
        if key[0] != "patient":
            return
        versions = self.source.setdefault(key, [])
        count = len(versions) + 1
        row = dict(versions[-1][2]) if versions else {}
        groups = COLUMNS["patient"]
        chosen = rng.sample(sorted(groups), rng.randint(1, 2)) if versions else sorted(groups)
        wrote = {}
        for group in chosen:
            wrote[group] = f"p{count}"
            if group == "allergies":
                parts = set(row.get(groups[group], "").split(",")) - {""}
                if parts and rng.random() < 0.3:
                    parts.remove(rng.choice(sorted(parts)))
                wrote[group] = frozenset(parts | {f"p{count}"})
        for group, value in wrote.items():
            row[groups[group]] = ",".join(sorted(value)) if group == "allergies" else value
        dot = Dot("@his", count * 7)
        stamp = Stamp(stamp_of(self.now_us), Lane.ROUTINE, "attending", f"p{count}")
        versions.append((dot, stamp, row))
        self.events.append(h.SourceWrites(key, count, wrote, us_of(stamp.hlc), stamp.hlc))
        for target in self.stores.values():
            if rng.random() < 0.7:  # Else overtaken by a later one, or by the last feed.
                self._at(self._delay_us(), functools.partial(self._feed, target, key, count))

    def _feed(self, store: Store, key: h.Key, count: int) -> None:
        dot, stamp, row = self.source[key][count - 1]
        table = self.tables[key[0]]
        values = dict.fromkeys(table.group_of) | row
        self.events.append(h.Fed(store.name, key, count, self._wall_us(store)))
        self._take(store, key, source_record(dot, stamp, values, table))

    def _cut(self, store: Store, key: h.Key, rng: random.Random) -> None:
        side = set(rng.sample(self.names, rng.randint(1, len(self.names) - 1)))
        self.cuts |= {frozenset((a, b)) for a in side for b in set(self.names) - side}

    def _heal(self, store: Store, key: h.Key, rng: random.Random) -> None:
        self.cuts.clear()

    def _sync(self, store: Store, key: h.Key, rng: random.Random) -> None:
        for each in self.plan.keys:
            self._send(store, each, store.neighbours)

    def _crash(self, store: Store, key: h.Key, rng: random.Random) -> None:
        self.events.append(h.Crashed(store.name))
        self._start(store)

    def _backup(self, store: Store, key: h.Key, rng: random.Random) -> None:
        store.backup = (dict(store.records), store.latest)
        self.events.append(h.BackedUp(store.name))

    def _restore(self, store: Store, key: h.Key, rng: random.Random) -> None:
        records, store.latest = store.backup
        store.records = dict(records)
        store.acknowledged = {}
        self.events.append(h.Restored(store.name))
        self._start(store)

    def _jump(self, store: Store, key: h.Key, rng: random.Random) -> None:
        store.skew_us += rng.choice([-3600, -600, 600, 3600]) * SECOND

    def _sweep(self, store: Store, key: h.Key, rng: random.Random) -> None:
        self._pass(OUTAGE_US // 2)
        others = [name for name in self.names if name != store.name]
        acknowledged = {name: store.acknowledged.get((name, key), EMPTY) for name in others}
        record = store.records.get(key, UNSEEN)
        if not self.merge.may_forget(record, self.tables[key[0]], acknowledged, self.now_us):
            return
        name, hlc = f"f{next(self.count)}", store.clock.tick()
        store.latest = store.clock.latest
        stamp = Stamp(hlc, Lane.ROUTINE, "", name)
        store.records[key] = self.merge.forget(record, store.actor, stamp)
        self.events.append(h.Forgotten(name, store.name, key, us_of(hlc), hlc, store.actor))
        self._send(store, key, store.neighbours)


def _writer(entry, column: str) -> str:
    """Who wrote an entry: the edit's name; for a source, whose rows repeat, by the value."""
    if entry.dot.of_source and column != DELETED:
        return str(entry.values[column])
    return entry.stamp.editor
