"""From the tables of one store to those of the partitions of another, and back: every record, as of the last commit.

Neither is a commit: the tables are in the new stores when these commit the next time. Whole records are copied, in one
pass over the old files. An interrupted call can be made again, and goes on where shards are missing.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from shardemb.base.progress import track
from shardemb.commits import rewrite
from shardemb.engine.training import Training
from shardemb.errors import ShardEmbError
from shardemb.format import store_paths
from shardemb.format.table_files import TableLocation
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardemb.base.progress import Progress
    from shardemb.format.spec import TableSpec
    from shardemb.session.session import Session
    from shardemb.session.table_catalog import CommittedTable
    from shardemb.store.partition import Partition


def spread(source: Session, partitions: Sequence[Partition], progress: Progress = None) -> None:
    """Give all partitions of a store the tables of another store.

    Parameters
    ----------
    source : Session
        Open for writing, without changes.
    partitions : sequence of Partition
        All of them, in order; held, at no commit. When this returns they are open, and have the tables in addition.
    progress : optional
        As for `Store.reshard`.

    Raises
    ------
    ShardEmbError
        The store has changes, vocabularies, or rows that are frozen.
    FormatError
        A block is damaged.
    DiskFullError, OSError
        The disk is full, or fails.
    """
    tables = _tables_of(source)
    specs = {name: _specs(source, each, partitions) for name, each in tables.items()}
    for name, each in tables.items():
        new = [_location(part, spec) for part, spec in zip(partitions, specs[name], strict=True)]
        with track(each.shards.spec.num_embeddings, f"splitting {name!r}", progress=progress) as advance:
            rewrite.spread(each.shards.location, new, advance)
    for number, part in enumerate(partitions):
        part.open((0, None))
        for name, each in tables.items():
            part.adopt_table(name, specs[name][number], _training(each))
        files.remove_tree(store_paths.rebuilt(part.path))  # what another call had begun


def _tables_of(source: Session) -> dict[str, CommittedTable]:
    """Return the tables of a store's last commit by name; all of it is in their files then."""
    path, committed = source.runtime.path, source.runtime.committed
    if committed.commit is None:
        msg = f"the store {path} has no commit, so there is nothing to split; call commit() first"
        raise ShardEmbError(msg)
    if source.has_changes():
        msg = f"the store {path} has changes that are not committed; call commit() or rollback() first"
        raise ShardEmbError(msg)
    if committed.vocabularies:
        named = ", ".join(repr(each.name) for each in committed.vocabularies)
        msg = (
            f"the store {path} has vocabularies ({named}), whose keys get other rows when there are partitions; export "
            f"its tables with their keys, and import these"
        )
        raise ShardEmbError(msg)
    source.checkpoint()
    tables = {each.table.name: each for each in source.tables.committed.values()}
    frozen = [name for name, each in tables.items() if each.table.entry.frozen]
    if frozen:
        msg = f"table {frozen[0]!r} of the store {path} has frozen rows; call unfreeze_rows() and commit() first"
        raise ShardEmbError(msg)
    return tables


def _training(table: CommittedTable) -> Training:
    entry = table.table.entry
    return Training(entry.optimizer, entry.step)


def _specs(source: Session, table: CommittedTable, partitions: Sequence[Partition]) -> list[TableSpec]:
    """Return what a table becomes in each partition."""
    spec, count = table.shards.spec, len(partitions)
    padding, commit = spec.padding_idx, source.runtime.committed.commit
    found = []
    for number, part in enumerate(partitions):
        named = f"{part.identity} {commit}"
        found.append(
            replace(
                spec,
                uuid=str(uuid.uuid5(uuid.UUID(spec.uuid), named)),
                num_embeddings=max(1, len(range(number, spec.num_embeddings, count))),
                padding_idx=None if padding is None or padding % count != number else padding // count,
                first=number,
                stride=count,
            )
        )
    return found


def _location(part: Partition, spec: TableSpec) -> TableLocation:
    return TableLocation(spec, store_paths.rebuilt(part.path) / spec.uuid)


def gather(
    partitions: Sequence[Partition],
    target: Session,
    shapes: Mapping[str, tuple[int, int | None]],
    progress: Progress,
) -> None:
    """Give a store the tables of all partitions of another.

    Parameters
    ----------
    partitions : sequence of Partition
        All of them, in order, open at the same commit, without changes.
    target : Session
        Open for writing.
    shapes : mapping of str to (int, int or None)
        For each table the number of its rows as a whole, and its row of padding.
    progress : optional
        As for `spread`.

    Raises
    ------
    ShardEmbError, FormatError, DiskFullError, OSError
        As `spread`; or the store has a table of that name.
    """
    tables = [part.tables_in_files() for part in partitions]
    for name, (rows, padding) in shapes.items():
        old = [each[name] for each in tables]
        spec = old[0].shards.spec
        named = f"{partitions[0].identity} {partitions[0].status.decided}"
        spec = replace(
            spec,
            uuid=str(uuid.uuid5(uuid.UUID(spec.uuid), named)),
            num_embeddings=rows,
            padding_idx=padding,
            first=0,
            stride=1,
        )
        new = TableLocation(spec, store_paths.rebuilt(target.runtime.path) / spec.uuid)
        with track(rows, f"gathering {name!r}", progress=progress) as advance:
            rewrite.gather([each.shards.location for each in old], new, advance)
        target.adopt_table(name, spec, _training(old[0]))
