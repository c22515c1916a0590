"""What can go wrong, grouped by what a handler would do about it.

Every error that shardemb raises on its own account is a `ShardEmbError` and also the built-in exception that
a caller would expect, so ``except IndexError`` keeps working in code that has never heard of shardemb.
Wrong dtypes and shapes are plain `TypeError` and `ValueError`.

::

    ShardEmbError
    |-- the call names something that is not there
    |   |-- RowIdError (IndexError)               an id outside the table
    |   |-- TableNotFoundError (KeyError)         no table of that name
    |   |-- TableExistsError (FileExistsError)    a table of that name exists
    |   |-- VocabularyNotFoundError (KeyError)    no vocabulary of that name
    |   |-- VocabularyExistsError (FileExistsError)
    |   |-- UnknownKeyError (KeyError)            a key that has no row
    |   |-- StoreNotFoundError (FileNotFoundError)
    |   `-- StoreExistsError (FileExistsError)
    |-- the store is not open for this
    |   |-- StoreLockedError (BlockingIOError)    another process writes to it
    |   |-- StoreClosedError (ValueError)         it was closed
    |   `-- ReadOnlyError (PermissionError)       it was opened with mode "r"
    `-- the disk
        |-- FormatError (ValueError)              the files are not what the metadata says
        |   `-- LogDamagedError                   the log lost what it had made durable
        |-- StaleReaderError (RuntimeError)       another writer came; refresh
        |-- DiskFullError (OSError)               nothing was changed; make room and call again
        `-- PoisonedError (RuntimeError)          memory and disk may disagree; reopen

All of them survive pickling.
"""

from __future__ import annotations

__all__ = [
    "DiskFullError",
    "FormatError",
    "LogDamagedError",
    "PoisonedError",
    "ReadOnlyError",
    "RowIdError",
    "ShardEmbError",
    "StaleReaderError",
    "StoreClosedError",
    "StoreExistsError",
    "StoreLockedError",
    "StoreNotFoundError",
    "TableExistsError",
    "TableNotFoundError",
    "UnknownKeyError",
    "VocabularyExistsError",
    "VocabularyNotFoundError",
]


class ShardEmbError(Exception):
    """Root of every error that shardemb raises on its own account."""


class RowIdError(ShardEmbError, IndexError):
    """A row id lies outside the table. Nothing wraps around: negative ids are refused too."""


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
    """The store already holds a table of that name."""


class VocabularyExistsError(ShardEmbError, FileExistsError):
    """The store already holds a vocabulary of that name."""


class StoreNotFoundError(ShardEmbError, FileNotFoundError):
    """There is no store at that path, or what is there is not a store."""


class StoreExistsError(ShardEmbError, FileExistsError):
    """There is a store at that path already and the mode asked for a new one."""


class StoreLockedError(ShardEmbError, BlockingIOError):
    """Another opening of the store holds its lock: one writer at a time."""


class StoreClosedError(ShardEmbError, ValueError):
    """The store was closed; so are its tables."""


class ReadOnlyError(ShardEmbError, PermissionError):
    """The store was opened with mode ``"r"``."""


class FormatError(ShardEmbError, ValueError):
    """The files are not what the metadata says: newer version, corrupt metadata, missing or short shard."""


class LogDamagedError(FormatError):
    """The log lost something that it had made durable: what is left is not a commit."""


class StaleReaderError(ShardEmbError, RuntimeError):
    """The store was recovered or opened by another writer since this reader opened it; call ``store.refresh()``."""


class DiskFullError(ShardEmbError, OSError):
    """The disk has no room. The call changed nothing; make room and call it again."""


class PoisonedError(ShardEmbError, RuntimeError):
    """A write, a sync or an update broke off half way: commits are refused. The message says what helps."""
