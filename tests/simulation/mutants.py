"""Merge code with one known fault each: the checker must find every one of them."""

import collections.abc
import dataclasses

from schemas.batches import Lane
from schemas.hlc import HybridClock
from schemas.siblings import ROW, UNSEEN, Entry, Record
from schemas.versions import includes, join
from tests.simulation.world import Merge
from transforms.conflicts.show import show


class EagerDiscard(Merge):
    """What loses by a rule is dropped at once (DESIGN.md, decision 8)."""

    def join(self, held, arriving, table):
        joined = super().join(held, arriving, table)
        if joined is held:
            return held
        shown = self.show(joined, table)
        live = dict(joined.live)
        for conflict in shown.conflicts:
            if not conflict.open and conflict.shown is not None:
                live[conflict.group] = {
                    conflict.shown: joined.entries(conflict.group)[conflict.shown]
                }
        return Record(joined.seen, live)


class LastWriterWins(Merge):
    """Of all siblings the one with the latest stamp stays (traps 15, 16)."""

    def join(self, held, arriving, table):
        joined = super().join(held, arriving, table)
        live = {
            group: dict([max(entries.items(), key=lambda item: (item[1].stamp.hlc, item[0]))])
            for group, entries in joined.live.items()
            if entries
        }
        return joined if joined is held else Record(joined.seen, live)


class TombstoneDropped(Merge):
    """A deleted record is forgotten with all that was seen of it (traps 19 to 21)."""

    def join(self, held, arriving, table):
        joined = super().join(held, arriving, table)
        view = self.show(joined, table).groups[ROW]
        return UNSEEN if view.values["deleted"] and not view.conflict else joined


class TombstoneDroppedAfterOutage(Merge):
    """As the rule says when content may go, but what was seen goes with it."""

    def forget(self, record, actor, stamp):
        return UNSEEN


class ForgottenUnacknowledged(Merge):
    """A deleted record goes by its age alone, whoever has yet to hear of it."""

    def may_forget(self, record, table, acknowledged, now_us):
        return super().may_forget(record, table, {}, now_us)

    def forget(self, record, actor, stamp):
        return UNSEEN


class SameActorAfterRestore(Merge):
    """A store that went back to its backup counts its edits from there again."""

    def incarnation(self, starts):
        return "1"


class SeesEverything(Merge):
    """An edit replaces all siblings, shown or not: a vector without dots can say no less."""

    def edit(self, record, actor, stamp, changed, table, **how):
        shown = self.show(record, table)
        sights = {group: view.full_sight for group, view in shown.groups.items()}
        return super().edit(record, actor, stamp, changed, table, **how | {"seen": sights})


class SeesNow(Merge):
    """A form that was open for long replaces what came meanwhile, as two clients of a store do."""

    def edit(self, record, actor, stamp, changed, table, **how):
        how["seen"] = how["seen"] if stamp.decides else None
        return super().edit(record, actor, stamp, changed, table, **how)


class FirstCome(Merge):
    """Of two that do not know of each other the one that is held stays."""

    def join(self, held, arriving, table):
        joined = super().join(held, arriving, table)
        if joined is held or joined is arriving:
            return joined
        return Record(joined.seen, {**arriving.live, **held.live})


class NothingGoes(Merge):
    """Entries of both sides are put together, whatever has replaced them."""

    def join(self, held, arriving, table):
        groups = {**held.live, **arriving.live}
        live = {g: {**held.entries(g), **arriving.entries(g)} for g in groups}
        if all(includes(held.seen, dot) for es in arriving.live.values() for dot in es):
            return held
        return Record(join(held.seen, arriving.seen), live)


class AnyClock(Merge):
    """Every stamp is adopted, however far ahead."""

    def clock(self, wall_us, latest):
        return HybridClock(wall_us, 1 << 60, latest)


class ListsAreTexts(Merge):
    """A list is taken as written: who leaves an element out has removed it."""

    def edit(self, record, actor, stamp, changed, table, **how):
        return super().edit(record, actor, stamp._replace(decides=True), changed, table, **how)


class WrongOrder(Merge):
    """The role weighs more than the emergency."""

    def show(self, record, table):
        def calm(entry):
            return entry._replace(stamp=entry.stamp._replace(lane=Lane.ROUTINE))

        return super().show(_each(record, calm), table)


class EveryClockTrusted(Merge):
    """Of two edits the later stamp wins, however near, whoever distrusts the clock (trap 16)."""

    def show(self, record, table):
        def trusting(entry):
            return entry._replace(stamp=entry.stamp._replace(distrusted=()))

        blind = dataclasses.replace(self.rules, skew_bound_us=0)
        return show(_each(record, trusting), table, blind)


class EchoIsNews(Merge):
    """What a source repeats in every row competes with the edits that replaced it."""

    def show(self, record, table):
        return super().show(_each(record, lambda entry: entry._replace(base=None)), table)


def _each(record: Record, change: collections.abc.Callable[[Entry], Entry]) -> Record:
    live = {
        group: {dot: change(entry) for dot, entry in entries.items()}
        for group, entries in record.live.items()
    }
    return Record(record.seen, live)


MUTANTS = (
    EagerDiscard,
    LastWriterWins,
    TombstoneDropped,
    TombstoneDroppedAfterOutage,
    ForgottenUnacknowledged,
    SameActorAfterRestore,
    SeesEverything,
    SeesNow,
    FirstCome,
    NothingGoes,
    AnyClock,
    ListsAreTexts,
    WrongOrder,
    EveryClockTrusted,
    EchoIsNews,
)
