"""The journal of a partition, in which a commit has two halves, because others decide about it.

::

    propose   freeze -> append images and the prepared record -> one sync: the partition's vote
    decide    append the commit record, not synced -> remember
    drop      append a record of another attempt -> one sync -> the rows count as changed again

In between no fold begins, and whatever would wait for the commit is refused instead: the decision may never come. Only
where memory is short, rows are spilled, so that lookups go on. A store that closes in between leaves the log to the
next opening, which is told what was decided.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardemb.base.interrupts import signals_deferred
from shardemb.errors import PartitionError
from shardemb.session.journal import Journal

if TYPE_CHECKING:
    from shardemb.format.manifest import Decided
    from shardemb.session.attempt import Attempt


class PartitionJournal(Journal):
    """As `Journal`; all methods are called with the store's lock held."""

    @property
    def prepared(self) -> Decided | None:
        """What waits for a decision, if anything does."""
        attempt = self._attempt
        return attempt.manifest.decided if attempt is not None and attempt.prepared else None

    def propose(self, attempt: Attempt) -> None:
        """Make the changes of an attempt durable without committing them: `decide` or `drop` follows.

        Raises
        ------
        DiskFullError
            There is no space; nothing was changed.
        OSError
            A write or sync failed: the store is poisoned.
        """
        try:
            with signals_deferred():
                self._freeze(attempt)
            self._append_attempt(attempt, manifests=2)
            with signals_deferred():
                self._append_record(self._log.append_prepared, attempt.payload)
                attempt.prepared = True
        except BaseException:
            if not attempt.prepared:  # it is also if Ctrl-C came just then
                self._give_up(attempt)
            raise

    def decide(self) -> None:
        """Commit what is prepared. The commit record is not synced: if it is lost, the next opening is told.

        Raises
        ------
        PartitionError
            Nothing is prepared.
        OSError
            A write failed: the store is poisoned.
        """
        attempt = self._require_prepared()
        with signals_deferred():
            self._append_record(self._log.append_decision, attempt.payload)
            attempt.succeed()
            self._end_attempt(None)
        self._fold_if_due(attempt)

    def drop(self) -> None:
        """Let what is prepared count as changed again, because another decision was made.

        That is durable first: what comes next may remove files that the attempt would need, such as those of a table
        that is new in it, and whoever finds it prepared may still decide that it is a commit.

        Raises
        ------
        PartitionError
            Nothing is prepared.
        DiskFullError
            There is no space for a record; it is still prepared.
        OSError
            A write or sync failed: the store is poisoned.
        """
        attempt, payload = self._require_prepared(), self._runtime.committed.to_bytes()
        self._append((), payload)
        with signals_deferred():
            self._append_record(self._log.append_commit, payload)
            self._give_up(attempt)

    def leave_prepared(self) -> bool:
        """Wait for no decision any more, because the store closes; return whether one was waited for."""
        if self.prepared is None:
            return False
        self._end_attempt(None)
        return True

    def settle(self) -> None:
        """See `Journal.settle`; but do not wait for a decision.

        Raises
        ------
        PartitionError
            A commit waits for one.
        """
        with self._runtime.lock:
            if self.prepared is not None:
                msg = (
                    f"commit {self.prepared[0]} of {self._runtime.path} is prepared and not decided, and this has to "
                    f"wait for it; decide or abandon it first"
                )
                raise PartitionError(msg)
            super().settle()

    def wait(self) -> None:
        """See `Folds`; but not for a decision: rows are spilled instead, and lookups go on."""
        self._wait_for_fold()
        self._runtime.check_open()

    def try_to_drain(self) -> None:
        """See `Folds`; but not beside what is prepared."""
        self._wait_for_fold()
        if self.prepared is None:
            self._fold_once()
        self._runtime.check_open()

    def abandon(self, lock: int | None) -> None:
        """See `Journal.abandon`."""
        self.leave_prepared()
        super().abandon(lock)

    def _require_prepared(self) -> Attempt:
        if self._attempt is None or not self._attempt.prepared:
            msg = f"nothing is prepared in {self._runtime.path}"
            raise PartitionError(msg)
        return self._attempt
