"""The door of a partition: a store that is one part of a distributed one, and commits only together with the others.

A commit has two halves here. `Partition.prepare` makes the changes durable: that is this partition's vote. Whoever
coordinates the partitions then decides, and tells it by `Partition.decide` or `Partition.abandon`. A partition that
stops in between is *in doubt*: its next opening, `Partition.open`, is told what was decided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardemb.errors import PartitionError, StoreExistsError
from shardemb.format import store_paths
from shardemb.format.manifest import check_metadata, check_step, checked_decided
from shardemb.session.partition_journal import PartitionJournal
from shardemb.storage import files
from shardemb.store import opening, writer
from shardemb.store.store import Store

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from shardemb.engine.training import Training
    from shardemb.format.manifest import AttemptId, Decided, Manifest, PartitionIdentity
    from shardemb.format.spec import TableSpec
    from shardemb.session.session import Session
    from shardemb.session.table_catalog import CommittedTable


@dataclass(frozen=True)
class PartitionStatus:
    """What a partition has; all of it is durable, except a commit that was just decided.

    Attributes
    ----------
    commit : int
        Number of the last commit; 0 before the first.
    attempt : (int, str, int) or None
        The attempt that made it.
    prepared : (int, (int, str, int)) or None
        The commit that waits for a decision, and its attempt.
    """

    commit: int
    attempt: AttemptId | None
    prepared: Decided | None

    @property
    def decided(self) -> Decided:
        """The last commit and its attempt."""
        return self.commit, self.attempt


class Partition:
    """One partition of a distributed store, locked by this process. Made by `create` and `hold`; a context manager.

    It begins *held*: locked and read, and nothing in it is changed. `open` makes a store of it.

    Thread safety: one thread at a time may call the methods; the store has its own rules.

    Attributes
    ----------
    identity : PartitionIdentity
        Which part of which store it is.

    Examples
    --------
    >>> from shardemb.format.manifest import PartitionIdentity
    >>> from shardemb.store.partition import Partition
    >>> identity = PartitionIdentity("0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11", number=0, count=2)
    >>> with Partition.create(tmp / "part-0", identity) as part:
    ...     store = part.open((0, None))
    ...     table = store.create_table("tokens", num_embeddings=50, embedding_dim=4)
    ...     part.prepare((1, (1, "head", 1)), step=10)
    ...     part.decide()
    ...     part.status
    PartitionStatus(commit=1, attempt=(1, 'head', 1), prepared=None)
    """

    def __init__(self, held: writer.Held) -> None:
        self._held = held
        self._read = self._look()
        partition = self._read[0].partition
        if partition is None:
            msg = f"{held.runtime.path} is a store of its own and no partition; open it with shardemb.open"
            raise PartitionError(msg)
        self.identity: PartitionIdentity = partition
        self._session: Session | None = None
        self._store: Store | None = None

    @classmethod
    def create(cls, path: str | os.PathLike[str], identity: PartitionIdentity) -> Partition:
        """Create an empty partition, and hold it.

        Raises
        ------
        StoreExistsError, StoreNotFoundError
            A store is at `path`; or something that is none, or a folder that is not empty.
        """
        place = opening.resolved(path)
        if files.size(store_paths.manifest(place)) is not None:
            msg = f"{place} is a store already; choose an empty folder for {identity}"
            raise StoreExistsError(msg)
        opening.require_creatable(place, "w-")
        return cls._take(place, identity)

    @classmethod
    def hold(cls, path: str | os.PathLike[str]) -> Partition:
        """Lock a partition and read what it has, without changing it.

        What it has is made durable first, because others decide by it.

        Raises
        ------
        StoreNotFoundError, StoreLockedError, ReadOnlyError, FormatError
            As `shardemb.open`.
        PartitionError
            It is a store, but no partition.
        """
        place = opening.resolved(path)
        if files.size(store_paths.manifest(place)) is None:
            opening.require_creatable(place, "r+")
        return cls._take(place, None)

    @classmethod
    def _take(cls, place: Path, created: PartitionIdentity | None) -> Partition:
        runtime = opening.checked_runtime(
            place, writable=True, memory_budget=None, log_bytes=None, threads=None, warm=True
        )
        held = writer.Held.take(runtime)
        try:
            if created is not None:
                held.create(partition=created)
            return cls(held)
        except BaseException:
            held.release()
            raise

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.identity} at '{self._held.runtime.path}'>"

    @property
    def path(self) -> Path:
        """Its folder."""
        return self._held.runtime.path

    @property
    def status(self) -> PartitionStatus:
        """What it has: the last commit, and what is prepared."""
        if self._session is None:
            manifest, prepared = self._read
        else:
            manifest, prepared = self._session.runtime.committed, self._journal.prepared
        return PartitionStatus(*manifest.decided, prepared)

    @property
    def store(self) -> Store:
        """The store, once `open` was called. It commits through the partition alone.

        Raises
        ------
        PartitionError
            `open` was not called, or `close` was.
        """
        self._opened()
        assert self._store is not None
        return self._store

    def open(
        self,
        decided: Decided,
        *,
        memory_budget: int | None = None,
        log_bytes: int | None = None,
        threads: int | None = None,
        warm: bool = True,
    ) -> Store:
        """Open the partition at what was decided: what is prepared becomes a commit if it is that, or is dropped.

        Parameters
        ----------
        decided : (int, (int, str, int) or None)
            Number of the last commit of the distributed store, and its attempt.
        memory_budget, log_bytes, threads, warm : optional
            As for `shardemb.open`.

        Returns
        -------
        Store
            With the rows of this partition by their numbers here: row ``r`` is row ``number + r * count`` of the whole.

        Raises
        ------
        PartitionError
            Neither the last commit nor what is prepared is `decided`: it is an older copy, or another partition. Or it
            is open already.
        """
        path, status, decided = self._held.runtime.path, self.status, checked_decided(decided)
        if self._session is not None:
            msg = f"{self!r} is open already"
            raise PartitionError(msg)
        if decided not in (status.decided, status.prepared):
            msg = (
                f"{path} is {self.identity}, at commit {status.commit} of attempt {status.attempt} with "
                f"{status.prepared} prepared, and {decided} was decided; restore it from a copy of that commit"
            )
            raise PartitionError(msg)
        self._held.use(
            opening.checked_runtime(
                path,
                writable=True,
                memory_budget=memory_budget,
                log_bytes=log_bytes,
                threads=threads,
                warm=warm,
            )
        )
        try:
            self._session = self._held.session(decided)
        except BaseException:
            self._read = self._look()  # what was decided is on record, if it got so far
            raise
        self._store = Store(self._session)
        return self._store

    def adopt_table(self, name: str, spec: TableSpec, training: Training) -> None:
        """Add a table whose files are complete, among those that are being rebuilt: part of the next commit.

        Raises
        ------
        PartitionError
            It is not open.
        TableExistsError
            There is one of that name.
        """
        self._opened().adopt_table(name, spec, training)

    def tables_in_files(self) -> dict[str, CommittedTable]:
        """Return the tables of the last commit by name, all of which is in their files then.

        Raises
        ------
        PartitionError
            It is not open.
        OSError
            Writing failed.
        """
        session = self._opened()
        session.checkpoint()
        return {each.table.name: each for each in session.tables.committed.values()}

    def _look(self) -> tuple[Manifest, Decided | None]:
        replay = self._held.read()
        return replay.manifest, replay.prepared

    def prepare(
        self, decided: Decided, step: int | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Make every change since the last commit durable, to be committed or abandoned: the partition's vote.

        Changes that come before the decision belong to the commit after it. What has to wait for a commit meanwhile,
        such as a rollback, a fold, or room in a full memory budget, raises `PartitionError`.

        Parameters
        ----------
        decided : (int, (int, str, int))
            Number of the next commit, which follows the last one, and the attempt to make it.
        step, metadata : optional
            As for `Store.commit`.

        Raises
        ------
        PartitionError
            It is not open, another commit is the next, or one is prepared already.
        DiskFullError, OSError, PoisonedError, TypeError, ValueError
            As for `Store.commit`: nothing is prepared.
        """
        session, (number, attempt) = self._opened(), checked_decided(decided)
        if attempt is None or number != self.status.commit + 1:
            msg = f"{self!r} is at commit {self.status.commit}, so that {decided} cannot be prepared"
            raise PartitionError(msg)
        step, document = check_step(step), check_metadata(metadata)
        with session.runtime.changing():
            session.runtime.check_sound()
            self._journal.prepare([table.shards for table in session.tables.current.values()])
            planned, _ = session.attempt(step, document, attempt)
            self._journal.propose(planned)

    def decide(self) -> None:
        """Commit what is prepared.

        The commit is not synced here: after a loss of power it is in doubt again, and was decided all the same.

        Raises
        ------
        PartitionError
            Nothing is prepared.
        OSError, PoisonedError
            Writing failed. The next opening commits it.
        """
        session = self._opened()
        with session.runtime.changing():
            session.runtime.check_sound()
            self._journal.decide()
            session.vocabularies.rebuild_stale_indexes()

    def abandon(self) -> None:
        """Let what is prepared count as changed again: another decision was made. No opening can commit it then.

        Raises
        ------
        PartitionError
            Nothing is prepared.
        DiskFullError
            There is no space to record that; it is still prepared.
        OSError, PoisonedError
            Writing failed.
        """
        with self._opened().runtime.changing():
            self._journal.drop()

    def _opened(self) -> Session:
        if self._store is None or self._session is None:
            msg = f"{self!r} is not open; call open() with what was decided"
            raise PartitionError(msg)
        return self._session

    @property
    def _journal(self) -> PartitionJournal:
        assert self._session is not None
        assert isinstance(self._session.journal, PartitionJournal)
        return self._session.journal

    def close(self) -> None:
        """Close the store and release the lock. What is prepared stays so: it is in doubt until the next opening."""
        store, self._store = self._store, None
        if store is not None:
            store.close()
        self._held.release()
