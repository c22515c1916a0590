"""What can go wrong, grouped by what a handler would do about it.

Every error of shardemb's own is a `ShardEmbError`, and also the built-in exception that a caller would expect, so
``except IndexError`` keeps working in code that does not know shardemb. Wrong dtypes and shapes are plain `TypeError`
and `ValueError`.

::

    ShardEmbError
    |-- the call names something that does not exist, or exists already
    |   |-- RowIdError (IndexError)               an id outside the table
    |   |-- TableNotFoundError (KeyError)         no table of that name
    |   |-- TableExistsError (FileExistsError)    a table of that name exists already
    |   |-- TagNotFoundError (KeyError)           no tag of that name
    |   |-- TagExistsError (FileExistsError)      a tag of that name exists already
    |   |-- VocabularyNotFoundError (KeyError)    no vocabulary of that name
    |   |-- VocabularyExistsError (FileExistsError)
    |   |-- UnknownKeyError (KeyError)            a key that has no row
    |   |-- StoreNotFoundError (FileNotFoundError)
    |   `-- StoreExistsError (FileExistsError)
    |-- a store over several processes; go on from its last commit
    |   |-- OwnerLostError (ConnectionError)      a process that has partitions does not answer
    |   |-- EraEndedError (RuntimeError)          rows went back to the last commit since
    |   `-- PartitionError (RuntimeError)         a partition is missing, misplaced or at another commit
    |-- the table is not set up for this
    |   |-- FrozenRowError (ValueError)           an update of a frozen row
    |   `-- LearningRateError (ValueError)        a learning rate that has to be set again
    |-- SourceError (ValueError)                  a file to import is not what it claims to be
    |-- the store is not open for this
    |   |-- StoreLockedError (BlockingIOError)    it is already open for writing
    |   |-- StoreClosedError (ValueError)         it was closed
    |   `-- ReadOnlyError (PermissionError)       it was opened with mode "r"
    `-- the disk
        |-- FormatError (ValueError)              the files are not what the metadata says
        |   `-- LogDamagedError                   the log lost something that was durable
        |-- StaleReaderError (RuntimeError)       another writer opened the store; refresh
        |-- DiskFullError (OSError)               nothing was changed; free some space and call again
        `-- PoisonedError (RuntimeError)          memory and disk may disagree; reopen

All of them survive pickling.
"""

from __future__ import annotations

__all__ = [
    "DiskFullError",
    "EraEndedError",
    "FormatError",
    "FrozenRowError",
    "LearningRateError",
    "LogDamagedError",
    "OwnerLostError",
    "PartitionError",
    "PoisonedError",
    "ReadOnlyError",
    "RowIdError",
    "ShardEmbError",
    "SourceError",
    "StaleReaderError",
    "StoreClosedError",
    "StoreExistsError",
    "StoreLockedError",
    "StoreNotFoundError",
    "TableExistsError",
    "TableNotFoundError",
    "TagExistsError",
    "TagNotFoundError",
    "UnknownKeyError",
    "VocabularyExistsError",
    "VocabularyNotFoundError",
]


class ShardEmbError(Exception):
    """Base class of all errors of shardemb's own."""


class RowIdError(ShardEmbError, IndexError):
    """A row id is outside the table. Ids do not wrap around, so negative ones are refused too."""


def _message(error: BaseException) -> str:
    # KeyError prints the repr of its argument, which would put the whole message in quotes.
    return str(error.args[0]) if error.args else ""


class TableNotFoundError(ShardEmbError, KeyError):
    """The store holds no table of that name."""

    __str__ = _message


class VocabularyNotFoundError(ShardEmbError, KeyError):
    """The store holds no vocabulary of that name."""

    __str__ = _message


class UnknownKeyError(ShardEmbError, KeyError):
    """A key has no row in the vocabulary."""

    __str__ = _message


class TableExistsError(ShardEmbError, FileExistsError):
    """The store already holds a table of that name, or something foreign is in the place of its folder."""


class VocabularyExistsError(ShardEmbError, FileExistsError):
    """The store already holds a vocabulary of that name."""


class TagNotFoundError(ShardEmbError, KeyError):
    """The store has no tag of that name."""

    __str__ = _message


class TagExistsError(ShardEmbError, FileExistsError):
    """The store already has a tag of that name."""


class StoreNotFoundError(ShardEmbError, FileNotFoundError):
    """There is no store at that path, or what is there is not one."""


class StoreExistsError(ShardEmbError, FileExistsError):
    """The mode asks for a new store, but there already is one at that path."""


class StoreLockedError(ShardEmbError, BlockingIOError):
    """The store is already open for writing, here or in another process; only one writer is allowed at a time."""


class FrozenRowError(ShardEmbError, ValueError):
    """An update has gradients for a row that is frozen. Nothing was changed."""


class LearningRateError(ShardEmbError, ValueError):
    """The learning rate is a function that the store could not keep, or it gave no number. Nothing was changed."""


class PartitionError(ShardEmbError, RuntimeError):
    """A partition cannot do this alone, or it is missing, not the one that is meant, or not at that commit."""


class SourceError(ShardEmbError, ValueError):
    """What shall be imported is not what it claims to be; the message says where. No table was created."""


class StoreClosedError(ShardEmbError, ValueError):
    """The store was closed, and its tables with it."""


class ReadOnlyError(ShardEmbError, PermissionError):
    """The store was opened with mode ``"r"``, or its file system or the permissions allow no writing."""


class FormatError(ShardEmbError, ValueError):
    """The files are not what the metadata says: newer version, corrupt metadata, missing or short shard."""


class LogDamagedError(FormatError):
    """The log lost something that was durable already: what is left of it is not a commit."""


class StaleReaderError(ShardEmbError, RuntimeError):
    """Another writer has opened the store since this reader did, or the tag was released; call ``store.refresh()``."""


class DiskFullError(ShardEmbError, OSError):
    """The disk is full, or a file may not grow (``ulimit -f``). Nothing was changed; mend that and call again."""


class PoisonedError(ShardEmbError, RuntimeError):
    """A write, a sync or an update failed halfway, so commits are refused. The message says what to do."""


class OwnerLostError(ShardEmbError, ConnectionError):
    """A process that has partitions of a distributed store ended or does not answer; go on from the last commit."""


class EraEndedError(ShardEmbError, RuntimeError):
    """All partitions of a distributed store went back to its last commit since; go on from that one."""
