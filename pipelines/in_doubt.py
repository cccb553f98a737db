"""Sets that were written to several stores at once, by configuration: write, look, recover."""

import contextlib
import dataclasses
from collections.abc import Iterable

from schemas.config import OFF, PRIMARY, Config
from schemas.errors import ConfigError
from transforms.two_phase.apply_together import Together, apply_together
from transforms.two_phase.branches import Branch, BranchDown, BranchRefused
from transforms.two_phase.decision_log import DecisionLog, Logged
from transforms.two_phase.mariadb_branch import MariaDbBranch
from transforms.two_phase.postgresql_branch import PostgresBranch
from transforms.two_phase.recover import Recovered, recover
from transforms.two_phase.states import OnBranchDown, TransactionId
from transforms.two_phase.writes import RowSet


def branches_of(config: Config, names: Iterable[str] = ()) -> list[Branch]:
    """Returns the branches of these names, of all where none is given: stores, then MariaDBs.

    Raises:
      ConfigError: there is no such branch.
    """
    seconds = config.two_phase.deadline_s
    known: dict[str, Branch] = {
        name: PostgresBranch(name, store.dsn, seconds) for name, store in config.stores.items()
    }
    for name, dsn in config.two_phase.branches.items():
        known[name] = MariaDbBranch(name, dsn, seconds)
    wanted = list(names) or list(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"two_phase: no branch `{name}`. Remedy: one of {', '.join(known)}.")
    return [known[name] for name in wanted]


def write_together(
    config: Config, sets: Iterable[RowSet], branches: Iterable[str] = ()
) -> Together:
    """Writes `sets` to the branches, all or none, as `two_phase` says; see `apply_together`.

    Raises:
      ConfigError: `two_phase.mode` is off, or there is no such branch.
    """
    settings = config.two_phase
    if settings.mode == OFF:
        raise ConfigError("two_phase.mode is off. Remedy: `two_phase: {mode: refuse}` or degrade.")
    with contextlib.closing(DecisionLog(config.stores[PRIMARY].dsn)) as log:
        return apply_together(
            log,
            sets,
            branches_of(config, branches),
            OnBranchDown(settings.mode),
            settings.deadline_s,
        )


@dataclasses.dataclass(frozen=True)
class InDoubtLook:
    """What is not finished: `prepared` is what branches hold, `down` who did not answer."""

    unfinished: list[Logged]
    prepared: dict[str, list[TransactionId]]
    down: dict[str, str]

    @property
    def strange(self) -> list[tuple[str, TransactionId]]:
        """What branches hold and the log does not know, with the branch's name."""
        known = {one.id for one in self.unfinished}
        return [
            (name, one) for name, ids in self.prepared.items() for one in ids if one not in known
        ]

    @property
    def attention(self) -> bool:
        """Whether something is late, held, incomplete or unknown, or a branch gave no answer."""
        return bool(self.strange or self.down or any(one.late for one in self.unfinished))


def look(config: Config) -> InDoubtLook:
    """Returns what is in doubt; changes nothing.

    Raises:
      StoreUnavailable: the primary store is down.
    """
    prepared: dict[str, list[TransactionId]] = {}
    down: dict[str, str] = {}
    with contextlib.closing(DecisionLog(config.stores[PRIMARY].dsn)) as log:
        here = log.identity()
        for branch in branches_of(config):
            try:
                found = branch.prepared(here.coordinator)
            except (BranchDown, BranchRefused) as error:
                down[branch.name] = str(error)
            else:
                prepared[branch.name] = [xid.transaction for xid in found]
            finally:
                branch.close()
        return InDoubtLook(log.unfinished(), prepared, down)


def recover_all(config: Config, presume_abort: bool = False) -> Recovered:
    """Settles what is in doubt at all branches; see `recover`.

    Raises:
      StoreUnavailable: the primary store is down.
    """
    with contextlib.closing(DecisionLog(config.stores[PRIMARY].dsn)) as log:
        return recover(log, branches_of(config), presume_abort)


def recover_quietly(config: Config) -> str:
    """Recovers and returns what a person should know of, "" for nothing: for a timer."""
    found = recover_all(config)
    said = [f"branch {name}: {why}" for name, why in found.down.items()]
    for what, number in (
        ("held for a person", len(found.held)),
        ("late", sum(one.late for one in found.unfinished)),
    ):
        if number:
            said.append(f"{number} two-phase transactions are {what}")
    return "; ".join(said)
