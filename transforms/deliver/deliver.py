"""Deliver change batches to a link's consult store; the ledger moves in the same transaction."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import apache_beam as beam
from apache_beam.metrics import Metrics

import schemas.receipts_wire  # noqa: F401  Registers the coder of receipts.
from schemas.batches import ChangeBatch, Lane
from schemas.clocks import wall_clock_us
from schemas.errors import StoreUnavailable
from schemas.links import LinkSettings
from schemas.panes import RoutinePane
from schemas.receipts import Receipt
from transforms.deliver.sets.claims import Claims
from transforms.deliver.sets.source_sets import source_sets
from transforms.deliver.sets.write_sets import SetWriter
from transforms.deliver.store import Store
from transforms.deliver.work_ahead import Outcome, WorkAhead
from transforms.parking import HERE
from transforms.seal_dead_letters import Sealer
from transforms.tell_once import TellOnce

_LOGGER = logging.getLogger(__name__)
_AHEAD_MAX = 8  # Panes delivered before they have come; credit allows some three under way.


class _DeliverFn(beam.DoFn):
    """Applies what it is given; what the store cannot take now is dropped, never waited for.

    Dropping is safe and keeps one store's trouble from every other link: the reader sends
    again whatever the ledger does not hold (ADR 0003).
    """

    def __init__(self, settings: LinkSettings, lane: Lane, now_us: Callable[[], int]):
        self._settings = settings
        self._lane = lane
        self._now_us = now_us
        self._tell = TellOnce(_LOGGER, f"link {settings.name}, {lane} lane")
        self._store: Store | None = None
        self._sets: SetWriter | None = None
        self._unclaimed = Metrics.counter("deliver", f"{lane}_unclaimed_batches_total")
        self._refused = Metrics.counter("deliver", f"{lane}_refused_batches_total")
        self._delivered = Metrics.counter("deliver", f"{lane}_delivered_rows_total")
        self._dead = Metrics.counter("deliver", f"{lane}_dead_letters_total")

    def setup(self):
        settings, claims, in_order = self._settings, None, frozenset()
        if settings.sets is not None:
            self._sets = SetWriter(settings, self._lane)
            claims = Claims(source_sets(settings).brought(settings.store))
            # A line's change ahead of its prescription would show the line alone.
            in_order = self._sets.names
        self._store = Store(
            settings.store_dsn,
            link=settings.name,
            campus=settings.source,
            sealer=Sealer(settings.key_ref),
            now_us=self._now_us,
            verify=HERE.verify,
            claims=claims,
            in_order=in_order,
        )

    def teardown(self):
        for part in (self._store, self._sets):
            if part is not None:
                part.close()

    def _apply(self, batches: Sequence[ChangeBatch]) -> Outcome:
        found = [batch for stub in batches if (batch := HERE.claim(stub)) is not None]
        # Nothing here: it was delivered already, or read by another worker. Either way the
        # ledger tells the reader, who sends again by value what is not in it.
        unclaimed = len(batches) - len(found)
        if not found:
            return Outcome(None, unclaimed)
        applied_to = None
        # Elsewhere no reader would ever let go of what is noted here.
        noted = found if self._settings.one_worker else ()
        HERE.begun(noted)
        try:
            if self._sets is not None:
                self._sets.bring(self._store, found)
            receipt = self._store.apply(found, self._lane)
            applied_to = receipt.progress
        except StoreUnavailable as error:
            # The text of a StoreUnavailable names servers and SQLSTATEs only.
            self._tell(str(error))
            return Outcome(None, unclaimed, len(found))
        finally:
            HERE.ended(noted, applied_to)
        HERE.applied(self._settings.name).set()
        if receipt.applied:  # A batch whose turn has not come is no sign that it goes on.
            self._tell("")
        return Outcome(receipt if receipt.applied else None, unclaimed)

    def _told(self, outcome: Outcome, late: int = 0) -> Iterator[Receipt]:
        self._unclaimed.inc(outcome.unclaimed)
        self._refused.inc(outcome.refused)
        receipt = outcome.receipt
        if receipt is not None:
            self._delivered.inc(receipt.counts.delivered)
            self._dead.inc(receipt.counts.dead)
            yield dataclasses.replace(receipt, late=late)


class _DeliverEmergencyFn(_DeliverFn):
    def process(self, batch: ChangeBatch):
        yield from self._told(self._apply((batch,)))


class _DeliverRoutineFn(_DeliverFn):
    def setup(self):
        super().setup()
        name = self._settings.name
        self._work = WorkAhead(
            f"deliver {name}",
            self._apply,
            lambda at: HERE.following(name, self._lane, at),
            # What is to be gathered in panes is not to be delivered one by one.
            0 if self._settings.limits.early_s else _AHEAD_MAX,
        )

    def teardown(self):
        self._work.close()
        super().teardown()

    def process(self, element: tuple[str, RoutinePane]):
        pane = element[1]
        late = pane.late_rows
        for outcome in self._work.outcomes(pane.batches):
            yield from self._told(outcome, late)
            late = 0


class DeliverEmergency(beam.PTransform):
    """Writes PCollection[ChangeBatch] of the emergency lane at once: one transaction each.

    Returns PCollection[Receipt], one for each batch that was applied. A batch that the store
    cannot take is dropped and sent again by its reader.
    """

    def __init__(self, settings: LinkSettings, now_us: Callable[[], int] = wall_clock_us):
        super().__init__()
        self._fn = _DeliverEmergencyFn(settings, Lane.EMERGENCY, now_us)

    def expand(self, batches):
        return batches | "Apply" >> beam.ParDo(self._fn).with_output_types(Receipt)


class DeliverRoutine(beam.PTransform):
    """Writes PCollection[KV[link, RoutinePane]]: one transaction a pane; returns receipts.

    As `DeliverEmergency` otherwise.
    """

    def __init__(self, settings: LinkSettings, now_us: Callable[[], int] = wall_clock_us):
        super().__init__()
        self._fn = _DeliverRoutineFn(settings, Lane.ROUTINE, now_us)

    def expand(self, panes):
        return panes | "Apply" >> beam.ParDo(self._fn).with_output_types(Receipt)
