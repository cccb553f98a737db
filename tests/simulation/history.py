"""What happened in a run, as an outsider sees it: the checker knows this and nothing else."""

import typing

Key = tuple[str, str]  # Table and record.


class Seen(typing.NamedTuple):
    """What a screen shows of one group: the value, who wrote what competes, and what is asked."""

    value: object
    writers: frozenset[str]
    open: bool
    drops: tuple[str, ...] = ()


class Look(typing.NamedTuple):
    """Somebody looks at a record at a store. `final`: after everything has arrived everywhere."""

    number: int
    store: str
    key: Key
    deleted: bool
    groups: dict[str, Seen]
    final: bool = False


class Edit(typing.NamedTuple):
    """Somebody writes, having looked at `look`; `wrote` is what the form held, by group."""

    name: str
    store: str
    key: Key
    look: int
    wrote: dict[str, object]
    role: str
    urgent: bool
    hlc_us: int
    hlc: int
    actor: str
    distrusted: frozenset[str]
    decides: bool
    stale: bool
    archived: bool
    wall_us: int


class SourceWrites(typing.NamedTuple):
    """The hospital's own system changes its row for the `count`-th time."""

    key: Key
    count: int
    wrote: dict[str, object]  # Only what changed.
    hlc_us: int
    hlc: int


class Fed(typing.NamedTuple):
    """A store has got the source's row as it was after the `count`-th change."""

    store: str
    key: Key
    count: int
    wall_us: int


class Sent(typing.NamedTuple):
    """A store sends what it holds of a record."""

    number: int
    store: str
    key: Key


class Arrived(typing.NamedTuple):
    """A message arrives, perhaps late, perhaps again."""

    number: int
    store: str
    wall_us: int


class BackedUp(typing.NamedTuple):
    store: str


class Restored(typing.NamedTuple):
    """A store is again as it was when it was last backed up."""

    store: str


class Crashed(typing.NamedTuple):
    store: str


class Forgotten(typing.NamedTuple):
    """A store lets the content of a deleted record go."""

    name: str
    store: str
    key: Key
    hlc_us: int
    hlc: int
    actor: str


Event = (
    Look | Edit | SourceWrites | Fed | Sent | Arrived | BackedUp | Restored | Crashed | Forgotten
)


def transcript(events: list[Event], key: Key) -> str:
    """Returns what concerns one record, in lines that a person can follow.

    Messages that tell nothing new are left out.
    """
    telling = _telling(events, key)
    lines = []
    for i, event in enumerate(events):
        if isinstance(event, Sent | Arrived) and event.number not in telling:
            continue
        if getattr(event, "key", key) == key:
            lines.append(f"  {i:3} {_line(event)}")
    return "\n".join(lines)


def _telling(events: list[Event], key: Key) -> set[int]:
    """Returns the messages by which some store learnt of an edit."""
    held: dict[str, set[object]] = {}
    carried: dict[int, set[object]] = {}
    telling = set()
    for event in events:
        if getattr(event, "key", key) != key:
            continue
        if isinstance(event, Edit | Forgotten):
            held.setdefault(event.store, set()).add(event.name)
        elif isinstance(event, Fed):
            held.setdefault(event.store, set()).add(event.count)
        elif isinstance(event, Restored):
            held[event.store] = set()
        elif isinstance(event, Sent):
            carried[event.number] = set(held.get(event.store, ()))
        elif isinstance(event, Arrived) and event.number in carried:
            known = held.setdefault(event.store, set())
            if not carried[event.number] <= known:
                telling.add(event.number)
                known |= carried[event.number]
    return telling


def _line(event: Event) -> str:
    if isinstance(event, Look):
        return _look_line(event)
    if isinstance(event, Edit):
        marks = {"urgent": event.urgent, "deciding": event.decides, "late": event.stale}
        how = " ".join(word for word, is_so in marks.items() if is_so)
        wrote = {g: sorted(v) if isinstance(v, frozenset) else v for g, v in event.wrote.items()}
        return (
            f"{event.store} {event.name} by {event.role or 'somebody'} {how} after look"
            f" {event.look} as {event.actor} at {event.hlc_us / 1e6:.3f} s: {wrote}"
        )
    if isinstance(event, Sent):
        return f"{event.store} sends message {event.number}"
    if isinstance(event, Arrived):
        return f"{event.store} gets message {event.number}"
    if isinstance(event, SourceWrites):
        return f"source writes for the {event.count}. time: {sorted(event.wrote)}"
    if isinstance(event, Fed):
        return f"{event.store} gets the source's row {event.count}"
    return f"{event.store}: {type(event).__name__.lower()}"


def _look_line(look: Look) -> str:
    groups = []
    for group, seen in look.groups.items():
        if seen.writers:
            of = f" of {'/'.join(sorted(seen.writers))}" if len(seen.writers) > 1 else ""
            groups.append(f"{group}={seen.value}{of}{' ?' if seen.open else ''}")
    gone = " DELETED" if look.deleted else ""
    end = " at the end" if look.final else ""
    return f"{look.store} shows{end} (look {look.number}):{gone} {', '.join(groups)}"
