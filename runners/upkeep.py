"""What goes on beside the sync job while `run` runs: quality is judged, persons are matched, and
what was deleted long ago is forgotten.

In a process and in transactions of its own, so that no delivery waits for it: the worker's
interpreter has better things to do, and a rule that needs other rows is SQL over the store anyway.
Numbers: ADR 0015.
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import threading
import typing
from collections.abc import Callable

import psycopg

from pipelines import empi
from pipelines.forget import forget_deleted
from pipelines.in_doubt import recover_quietly
from pipelines.quality import captured, check_one
from runners.reconcile_jobs import LOOK_S, ReconcileJobs
from schemas.clocks import monotonic_s
from schemas.config import OFF, Config
from schemas.conflict_policy import ConflictRules, load_conflict_rules
from schemas.errors import CampusSyncError, told
from schemas.patient_matching import MatchingRules, load_matching_rules
from schemas.quality_rules import QualityRules, load_quality_rules

_LOGGER = logging.getLogger(__name__)

# Of one processor, at most, however much there is to do: deliveries come first. Work that is put
# off is cheaper, since a patient who changed ten times is looked at once.
SHARE_MAX = 0.05
# A store that takes in more than this is filled in bulk: judging waits for its end, since it would
# take a processor from it, but not for longer than this.
_BULK_ROWS_PER_S = 5_000
_PUT_OFF_MAX_S = 60.0
_PATIENCE_S = 60.0  # A store that hangs in the middle of a look holds up the others this long.
_GOODBYE_S = 5.0  # A look that takes longer is left to end with the process: it is repeated.


def rules_of(reference: str) -> str:
    """Returns the rules that a command works by: `off` is said of `run` alone."""
    return "default" if reference == OFF else reference


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules by which `run` looks after the stores; None: switched off."""

    quality: QualityRules | None
    matching: MatchingRules | None
    conflicts: ConflictRules | None = None

    @classmethod
    def load(cls, config: Config) -> "Rules":
        """Returns those that a configuration names.

        Raises:
          ConfigError: a file has mistakes; the text lists them with lines and remedies.
        """
        quality, matching = config.quality_rules, config.patient_matching
        return cls(
            None if quality == OFF else load_quality_rules(quality),
            None if matching == OFF else load_matching_rules(matching),
            load_conflict_rules(config.conflict_rules),
        )


class Repeated:
    """Does one thing again and again in a thread while it is open, and never more than its share.

    Args:
      work: returns what is wrong, or an empty string; what it raises of our own errors and of the
        database's is the same. Told once, until it changes.
      every_s: from the end of one to the beginning of the next, unless the share asks for more.
      gate: held while it works, so that one such thing is done at a time.
      monotonic: a clock.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], str],
        every_s: float,
        gate: threading.Lock,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._name, self._work, self._every_s = name, work, every_s
        self._gate, self._monotonic = gate, monotonic
        self._said = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> typing.Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(_GOODBYE_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._stopping.wait(pause_s(self._once(), self._every_s))

    def _once(self) -> float:
        """Works once; returns how long it took."""
        mine = self._gate.acquire(timeout=_PATIENCE_S)
        began = self._monotonic()
        try:
            wrong = self._work() if not self._stopping.is_set() else ""
        except (CampusSyncError, psycopg.Error) as error:
            wrong = told(error)
        finally:
            if mine:
                self._gate.release()
        if wrong != self._said:
            _LOGGER.warning("%s: %s", self._name, wrong or "goes on")
            self._said = wrong
        return self._monotonic() - began


def pause_s(took_s: float, every_s: float) -> float:
    """Returns how long to rest after work that took `took_s`."""
    return max(every_s, took_s * (1 / SHARE_MAX - 1))


class Upkeep(contextlib.ExitStack):
    """Looks after all stores for as long as it is open: a thread a store, and one for persons.

    Persons are one matter of all stores: what people decide at one is carried to the others.

    Args:
      path: campuses.yaml, which reconciliations read in processes of their own; None: none are
        started.
    """

    def __init__(self, config: Config, rules: Rules, path: pathlib.Path | None = None):
        super().__init__()
        self._works: list[Repeated] = []
        self._jobs: ReconcileJobs | None = None
        gate = threading.Lock()
        if rules.matching is not None:
            match = functools.partial(_match, config, rules.matching)
            self._works.append(Repeated("patient matching", match, config.match_every_s, gate))
        if rules.quality is not None:
            for store in config.links_by_store():
                judge = Judge(config, store, rules.quality)
                name = f"quality of store {store}"
                self._works.append(Repeated(name, judge, config.quality_every_s, gate))
        if rules.conflicts is not None:
            tidy = functools.partial(_forget, config, rules.conflicts)
            name = "forgetting of deleted records"
            # It asks every store, and one that is frozen holds up nothing else.
            self._works.append(Repeated(name, tidy, config.forget_every_s, threading.Lock()))
        if config.two_phase.mode != OFF:
            recover = functools.partial(recover_quietly, config)
            every_s = config.two_phase.deadline_s
            # A branch that is frozen may hold it for seconds: nothing else waits for that.
            self._works.append(Repeated("two-phase recovery", recover, every_s, threading.Lock()))
        if config.reconcile is not None and path is not None:
            self._jobs = ReconcileJobs(config, config.reconcile, path)
            # It only starts processes and looks after them: it waits for nothing, nor they for it.
            self._works.append(Repeated("reconciliation", self._jobs, LOOK_S, threading.Lock()))

    def __enter__(self) -> typing.Self:
        super().__enter__()
        if self._jobs is not None:
            self.enter_context(self._jobs)
        for work in self._works:
            self.enter_context(work)
        return self


class Judge:
    """Judges one store whenever it is called, but not while the store is filled in bulk.

    Args:
      monotonic: a clock.
    """

    def __init__(
        self,
        config: Config,
        store: str,
        rules: QualityRules,
        monotonic: Callable[[], float] = monotonic_s,
    ):
        self._config, self._store, self._rules = config, store, rules
        self._monotonic = monotonic
        self._judged_s = monotonic()
        self._taken: tuple[float, int] | None = None

    def __call__(self) -> str:
        """Returns what is wrong, or an empty string."""
        if self._in_bulk():
            return ""
        self._judged_s = self._monotonic()
        return check_one(self._config, self._store, self._rules).why

    def _in_bulk(self) -> bool:
        before, now = self._taken, (self._monotonic(), captured(self._config, self._store))
        self._taken = now
        if before is None or now[0] - self._judged_s > _PUT_OFF_MAX_S:
            return False
        return now[1] - before[1] > _BULK_ROWS_PER_S * max(now[0] - before[0], 1e-3)


def _forget(config: Config, rules: ConflictRules) -> str:
    forget_deleted(config, rules)
    return ""


def _match(config: Config, rules: MatchingRules) -> str:
    found = empi.link_stores(config, rules)
    return "; ".join(f"store {one.store}: {one.why}" for one in found if one.why)
