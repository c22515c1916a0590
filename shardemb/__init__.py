"""Embedding tables larger than memory: plain zarr on disk, NumPy in and NumPy out, trained in place.

>>> import shardemb
>>> with shardemb.open(tmp / "words.zarr") as store:
...     table = store.create_table("tokens", num_embeddings=400_000, embedding_dim=128)
...     rows = table.lookup([[1, 2], [3, 4]])
...     commit = store.commit(step=0)
>>> rows.shape
(2, 2, 128)

Importing shardemb does not load zarr, numba, dask or pyarrow; opening the first store does.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

from shardemb import dtypes, initializers, optim
from shardemb.admission import Admission
from shardemb.errors import (
    DiskFullError,
    EraEndedError,
    FormatError,
    FrozenRowError,
    LearningRateError,
    LogDamagedError,
    OwnerLostError,
    PartitionError,
    PoisonedError,
    ReadOnlyError,
    RowIdError,
    ShardEmbError,
    SourceError,
    StaleReaderError,
    StoreClosedError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
    TableExistsError,
    TableNotFoundError,
    TagExistsError,
    TagNotFoundError,
    UnknownKeyError,
    VocabularyExistsError,
    VocabularyNotFoundError,
)

if TYPE_CHECKING:
    from shardemb import exports, text
    from shardemb.bags import Bags
    from shardemb.format.manifest import Commit
    from shardemb.session.pending_commit import PendingCommit
    from shardemb.store.keyed_table import KeyedTable
    from shardemb.store.opening import open
    from shardemb.store.store import Store
    from shardemb.store.table import Table
    from shardemb.store.vocabulary import Vocabulary

__version__ = _version("shardemb")

__all__ = [
    "Admission",
    "Bags",
    "Commit",
    "DiskFullError",
    "EraEndedError",
    "FormatError",
    "FrozenRowError",
    "KeyedTable",
    "LearningRateError",
    "LogDamagedError",
    "OwnerLostError",
    "PartitionError",
    "PendingCommit",
    "PoisonedError",
    "ReadOnlyError",
    "RowIdError",
    "ShardEmbError",
    "SourceError",
    "StaleReaderError",
    "Store",
    "StoreClosedError",
    "StoreExistsError",
    "StoreLockedError",
    "StoreNotFoundError",
    "Table",
    "TableExistsError",
    "TableNotFoundError",
    "TagExistsError",
    "TagNotFoundError",
    "UnknownKeyError",
    "Vocabulary",
    "VocabularyExistsError",
    "VocabularyNotFoundError",
    "__version__",
    "dtypes",
    "exports",
    "initializers",
    "open",
    "optim",
    "text",
]

_LAZY = {
    "Bags": "bags",
    "open": "store.opening",
    "Store": "store.store",
    "Table": "store.table",
    "Commit": "format.manifest",
    "PendingCommit": "session.pending_commit",
    "KeyedTable": "store.keyed_table",
    "Vocabulary": "store.vocabulary",
}


def __getattr__(name: str) -> object:
    if name in ("exports", "text"):
        return import_module(f"shardemb.{name}")
    if name not in _LAZY:
        msg = f"module 'shardemb' has no attribute {name!r}"
        raise AttributeError(msg)
    value: object = getattr(import_module(f"shardemb.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
