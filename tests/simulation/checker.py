"""What must be kept and shown, decided from the history alone: none of the merge code is used.

An edit has replaced what its editor had seen. So of the edits that have reached a store, those
compete that none of the others has replaced, transitively. What has reached a store follows from
messages: each carries all that had reached its sender. Which of them is shown follows from the
rules as the domain notes order them, written here a second time.
"""

import collections
import typing

from tests.simulation import history as h

SKEW_US = 300_000_000
RANKS = {"superior": 4, "attending": 3, "consultant": 2, "trainee": 1, "": 0}
FURTHER = {"requested": 0, "arrived": 1, "answered": 2, "signed_off": 3}
NONE = {"无"}
ROW = "row"
KINDS = {
    "plan": "all",
    "participants": "list",
    "follow_up": "time",
    "number": "first",
    "opinion": "never",
    "status": "state",
    "answered_at": "role and time",
    "identity": "never",
    "blood": "lock",
    "phone": "time",
    "allergies": "list",
    "upkeep": "owner",
    ROW: "row",
}
GROUPS = {
    "treatment_plan": ("plan", "participants", "follow_up", "number"),
    "consultation": ("opinion", "status", "answered_at"),
    "patient": ("identity", "blood", "phone", "allergies", "upkeep"),
}


class Fault(typing.NamedTuple):
    """What is not as it must be: `event` is its place in the history, `key` the record."""

    kind: str
    event: int
    key: h.Key
    what: str


class Written(typing.NamedTuple):
    """One edit of one record, by a client or by the source."""

    name: str
    values: dict[str, object]  # What it says, by group; of a list what it adds.
    replaced: dict[str, int]  # Edits that it has replaced, as bits, by group.
    urgent: bool
    role: str
    hlc_us: int
    order: tuple
    actor: str
    distrusted: frozenset[str]
    archived: bool
    drops: dict[str, frozenset[str]]
    source: bool = False


class Expected(typing.NamedTuple):
    """What a store must show of a group."""

    value: object
    live: int
    open: bool
    rests_on: int
    drops: tuple[str, ...] = ()


def faults_of(events: list[h.Event]) -> list[Fault]:
    """Returns all that is wrong in a history."""
    return _Checker(events).faults()


class _Checker:
    def __init__(self, events: list[h.Event]):
        self._events = events
        self._written: dict[h.Key, list[Written]] = collections.defaultdict(list)
        self._source: dict[h.Key, list[int]] = collections.defaultdict(list)
        self._held: dict[str, dict[h.Key, int]] = collections.defaultdict(dict)
        self._backups: dict[str, dict[h.Key, int]] = {}
        self._carried: dict[int, tuple[h.Key, int]] = {}
        self._looks: dict[int, dict[str, Expected]] = {}
        self._memo: dict[tuple, Expected] = {}
        self._clocks: dict[str, int] = {}
        self._walls: dict[str, int] = {}
        self._at: int = 0
        self._found: list[Fault] = []

    def faults(self) -> list[Fault]:
        for place, event in enumerate(self._events):
            self._at = place
            if isinstance(event, h.Look):
                self._check_look(event)
            elif isinstance(event, h.Edit):
                self._note_edit(event)
            elif isinstance(event, h.Forgotten):
                self._note_forgotten(event)
            elif isinstance(event, h.SourceWrites):
                self._note_source(event)
            elif isinstance(event, h.Fed):
                self._see_clock(event.store, event.wall_us)
                self._learn(event.store, event.key, self._until(event.key, event.count))
            elif isinstance(event, h.Sent):
                held = self._held[event.store].get(event.key, 0)
                self._carried[event.number] = (event.key, held)
            elif isinstance(event, h.Arrived):
                self._see_clock(event.store, event.wall_us)
                self._learn(event.store, *self._carried[event.number])
            elif isinstance(event, h.BackedUp):
                self._backups[event.store] = dict(self._held[event.store])
            elif isinstance(event, h.Restored):
                self._held[event.store] = dict(self._backups.get(event.store, {}))
                self._clocks.pop(event.store, None)
        self._check_end()
        return self._found

    def _fault(self, kind: str, key: h.Key, what: str) -> None:
        self._found.append(Fault(kind, self._at, key, what))

    def _learn(self, store: str, key: h.Key, edits: int) -> None:
        self._held[store][key] = self._held[store].get(key, 0) | edits

    def _until(self, key: h.Key, count: int) -> int:
        return sum(1 << i for i in self._source[key][:count])

    def _see_clock(self, store: str, wall_us: int) -> None:
        self._walls[store] = max(wall_us, self._walls.get(store, 0))

    # What was done.

    def _note_edit(self, e: h.Edit) -> None:
        if e.hlc <= self._clocks.get(e.store, 0):
            self._fault("clock", e.key, f"{e.store} gave a stamp that is not later than its last")
        self._clocks[e.store] = e.hlc
        self._see_clock(e.store, e.wall_us)
        if e.hlc_us > self._walls[e.store] + SKEW_US:
            self._fault("clock", e.key, f"{e.store} is dragged ahead by another clock")
        number = len(self._written[e.key])
        held = self._held[e.store].get(e.key, 0)
        looked = self._looks[e.look]
        begins = e.wrote[ROW] is False and self._expected(e.key, ROW, held).value is not False
        values, replaced, drops = {}, {}, {}
        for group, value in e.wrote.items():
            kind, then = KINDS[group], looked[group]
            now = self._expected(e.key, group, held)
            asked = group != ROW or then.open
            if begins:
                gone = now.live
                if kind in ("list", "first", "owner"):
                    gone = self._of_stores(e.key, gone)
            elif e.decides:
                gone = then.live if asked else now.rests_on
            else:
                gone = self._replaceable(e.key, (then if e.stale else now).rests_on, kind)
            if kind == "list" and not e.decides and not begins:
                shown, after = now.value or frozenset(), value
                drop = ((then.value or frozenset()) & shown) - after
                if not after & NONE:
                    drop -= NONE
                value, drops[group] = after - shown, drop
                if not value and not drop:
                    continue
            values[group], replaced[group] = value, gone
        self._written[e.key].append(
            Written(
                e.name,
                values,
                replaced,
                e.urgent,
                e.role,
                e.hlc_us,
                (e.urgent, RANKS[e.role], e.hlc, e.actor, number),
                e.actor,
                e.distrusted,
                e.archived,
                drops,
            )
        )
        self._learn(e.store, e.key, 1 << number)

    def _replaceable(self, key: h.Key, edits: int, kind: str) -> int:
        if kind in ("list", "first"):
            return 0
        return self._of_stores(key, edits) if kind == "owner" else edits

    def _of_stores(self, key: h.Key, edits: int) -> int:
        return sum(1 << i for i in _bits(edits) if not self._written[key][i].source)

    def _note_forgotten(self, e: h.Forgotten) -> None:
        number, held = len(self._written[e.key]), self._held[e.store].get(e.key, 0)
        replaced = {g: self._live(e.key, g, held) for g in (*GROUPS[e.key[0]], ROW)}
        order = (False, 0, e.hlc, e.actor, number)
        self._written[e.key].append(
            Written(
                e.name,
                {ROW: True},
                replaced,
                False,
                "",
                e.hlc_us,
                order,
                e.actor,
                frozenset(),
                False,
                {},
            )
        )
        self._learn(e.store, e.key, 1 << number)

    def _note_source(self, e: h.SourceWrites) -> None:
        number = len(self._written[e.key])
        earlier = self._source[e.key]
        values, replaced = {ROW: False}, {}
        for group, value in e.wrote.items():
            if group == "allergies":
                before = self._source_list(e.key)
                values[group] = value - before
                replaced[group] = 0
            else:
                values[group] = value
        for group in values:
            if group != "allergies":
                mine = (i for i in earlier if group in self._written[e.key][i].values)
                replaced[group] = sum(1 << i for i in mine)
        gone = {}
        if "allergies" in e.wrote:
            gone["allergies"] = self._source_list(e.key) - e.wrote["allergies"]
        self._written[e.key].append(
            Written(
                f"p{e.count}",
                values,
                replaced,
                False,
                "attending",
                e.hlc_us,
                (False, RANKS["attending"], e.hlc, "@his", e.count),
                "@his",
                frozenset(),
                False,
                gone,
                True,
            )
        )
        self._source[e.key].append(number)

    def _source_list(self, key: h.Key) -> frozenset[str]:
        listed: frozenset[str] = frozenset()
        for i in self._source[key]:
            w = self._written[key][i]
            listed = (listed - w.drops.get("allergies", frozenset())) | w.values.get(
                "allergies", frozenset()
            )
        return listed

    # What must be.

    def _live(self, key: h.Key, group: str, held: int) -> int:
        live, gone = 0, 0
        for i in _bits(held):
            w = self._written[key][i]
            if group in w.values:
                live |= 1 << i
            gone |= w.replaced.get(group, 0)
        return live & ~gone

    def _expected(self, key: h.Key, group: str, held: int) -> Expected:
        memo = (key, group, held)
        if memo not in self._memo:
            self._memo[memo] = self._find(key, group, held)
        return self._memo[memo]

    def _find(self, key: h.Key, group: str, held: int) -> Expected:
        live = self._live(key, group, held)
        kind = KINDS[group]
        if kind == "list":
            return self._find_list(key, group, live)
        if not live:
            return Expected(None, 0, False, 0)
        found = sorted((self._as_of(key, i, held) for i in _bits(live)), key=lambda w: w.order)
        winner = _winner(found, kind, group)
        shown = winner or _meanwhile(found, kind, group)
        value = shown.values[group]
        if winner is not None:
            return Expected(value, live, False, live)
        rests_on = sum(1 << i for i in _bits(live) if self._written[key][i].values[group] == value)
        if kind == "lock":
            return Expected(None, live, True, 0)
        return Expected(value, live, True, rests_on)

    def _as_of(self, key: h.Key, i: int, held: int) -> Written:
        """A source's row has one time, that of its last change: its values may be older."""
        w = self._written[key][i]
        if not w.source:
            return w
        last = self._written[key][max(j for j in self._source[key] if held >> j & 1)]
        return w._replace(hlc_us=last.hlc_us, order=last.order)

    def _elements(self, key: h.Key, group: str, live: int) -> frozenset[str]:
        taken = set()
        for i in _bits(live):
            w = self._written[key][i]
            if w.source:
                taken |= {(x, w.name) for x in w.drops.get(group, ())}
        last = max((i for i in _bits(live) if self._written[key][i].source), default=-1)
        elements = set()
        for i in _bits(live):
            w = self._written[key][i]
            mine = set(w.values[group])
            if w.source:  # What the source itself has taken off its list since.
                for j in self._source[key]:
                    if i < j <= last:
                        mine -= self._written[key][j].drops.get(group, frozenset())
            elements |= mine
        return frozenset(elements)

    def _find_list(self, key: h.Key, group: str, live: int) -> Expected:
        found = self._elements(key, group, live)
        shown = (found - NONE) or found
        asked = set()
        for i in _bits(live):
            w = self._written[key][i]
            if not w.source:
                asked |= w.drops.get(group, frozenset())
        drops = tuple(sorted(asked & shown))
        return Expected(shown or None, live, bool(drops), live, drops)

    # What was seen.

    def _check_look(self, look: h.Look) -> None:
        held = self._held[look.store].get(look.key, 0)
        groups = (*GROUPS[look.key[0]], ROW)
        wanted = {group: self._expected(look.key, group, held) for group in groups}
        self._looks[look.number] = wanted
        gone = wanted[ROW].value is not False
        if look.deleted != gone:
            kind = "resurrection" if gone else "lost update"
            self._fault(kind, look.key, f"{look.store}: {look.key[1]} deleted is {look.deleted}")
        for group in groups:
            self._check_group(look, group, look.groups[group], wanted[group])

    def _check_group(self, look: h.Look, group: str, seen: h.Seen, wanted: Expected) -> None:
        place = f"{look.store}: {look.key[1]} {group}"
        value = seen.value
        if KINDS[group] == "list":
            value = frozenset(str(value).split(_separator(group))) if value else None
        else:
            names = {self._written[look.key][i].name for i in _bits(wanted.live)}
            if missing := names - seen.writers:
                self._fault("lost update", look.key, f"{place} lacks {sorted(missing)}")
            if revived := seen.writers - names:
                self._fault("resurrection", look.key, f"{place} has again {sorted(revived)}")
        if value != wanted.value:
            self._fault("wrong value", look.key, f"{place} shows {value}, not {wanted.value}")
        if (seen.open, seen.drops) != (wanted.open, wanted.drops):
            self._fault(
                "wrong question", look.key, f"{place} asks {seen.open} {seen.drops}, not {wanted}"
            )

    def _check_end(self) -> None:
        finals = [event for event in self._events if isinstance(event, h.Look) and event.final]
        for key in {look.key for look in finals}:
            looks = [look for look in finals if look.key == key]
            first = looks[0]
            for look in looks[1:]:
                if look.deleted != first.deleted or (
                    not look.deleted and look.groups != first.groups
                ):
                    self._fault(
                        "divergence", key, f"{look.store} and {first.store} differ: {key[1]}"
                    )
            held = {look.store: self._held[look.store].get(key, 0) for look in looks}
            everywhere = 0
            for edits in held.values():
                everywhere |= edits
            for store, edits in held.items():
                if edits != everywhere:
                    self._fault("not delivered", key, f"{store} never got all of {key[1]}")
            self._check_kept(key, everywhere)

    def _check_kept(self, key: h.Key, everywhere: int) -> None:
        """Only a store that went back to a backup can have taken an edit with it."""
        restored = {event.store for event in self._events if isinstance(event, h.Restored)}
        wrote = {e.name: e.store for e in self._events if isinstance(e, h.Edit | h.Forgotten)}
        for i, w in enumerate(self._written[key]):
            if not everywhere >> i & 1 and wrote.get(w.name) not in restored:
                self._fault("lost update", key, f"{w.name} is nowhere")


def _bits(edits: int):
    while edits:
        low = edits & -edits
        yield low.bit_length() - 1
        edits ^= low


def _separator(group: str) -> str:
    return "；" if group == "allergies" else ","


def _winner(found: list[Written], kind: str, group: str) -> Written | None:
    values = {w.values[group] for w in found}
    if len(values) == 1:
        return found[-1]
    if kind == "state":
        return max(found, key=lambda w: FURTHER[w.values[group]])
    if kind == "owner" and any(w.source for w in found):
        return next(w for w in found if w.source)
    if kind in ("never", "lock", "first", "row"):
        return None
    for one in found:
        if all(_beats(one, other, kind) for other in found if other is not one):
            return one
    return None


def _beats(one: Written, other: Written, kind: str) -> bool:
    if kind == "all" and one.archived != other.archived:
        return one.archived
    if kind in ("all", "owner") and one.urgent != other.urgent:
        urgent, routine = (one, other) if one.urgent else (other, one)
        if urgent.role == "consultant" and routine.role == "attending":
            return False
        return one.urgent
    if kind in ("all", "owner", "role and time") and one.role != other.role:
        return RANKS[one.role] > RANKS[other.role]
    if one.actor in other.distrusted or other.actor in one.distrusted:
        return False
    return one.hlc_us - other.hlc_us > SKEW_US and not one.source


def _meanwhile(found: list[Written], kind: str, group: str) -> Written:
    if kind == "row":
        return [w for w in found if w.values[group] is False][-1]
    if kind == "first":
        return min(found, key=lambda w: (w.order[2], w.order[3]))
    return found[-1]
