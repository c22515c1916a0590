"""From one store to a distributed one, and back, on one machine and without a cluster.

The partitions can then be copied to the machines of their owners. Both directions copy whole records; the result
commits as a whole, or it is not there.
"""

from __future__ import annotations

import contextlib
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shardemb.base import paths, validation
from shardemb.errors import PartitionError, StoreExistsError, StoreNotFoundError
from shardemb.format.manifest import MAX_PARTITIONS, PartitionIdentity
from shardemb.protocol.record import Record, partition_name
from shardemb.store import opening, spreading
from shardemb.store.partition import Partition
from shardemb.store.store import Store

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from shardemb.base.progress import Progress
    from shardemb.format.manifest import Commit
    from shardemb.format.spec import TableSpec
    from shardemb.protocol.record import Places


def split(
    store: str | os.PathLike[str],
    head: str | os.PathLike[str],
    *,
    partitions: int = 16,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Commit:
    """Make a distributed store with the tables of a store of one machine, as of its last commit.

    Every row keeps its bits, its optimizer state, and its initial value if it was never written. The store stays as it
    is. Its files are read once. If this is interrupted, the same call goes on with what is missing.

    Parameters
    ----------
    store : path-like
        The folder of the store; nobody else has it open for writing.
    head : path-like
        A new folder, for the head of the distributed store.
    partitions : int
        Number of partitions, fixed for the life of the store.
    folder : path-like, optional
        Where the partitions go: ``00000.zarr``, ``00001.zarr`` and so on. By default next to the head, in a folder of
        its name with ``.partitions`` after it. They can be moved to other machines: `shardemb.distributed.open` is
        told by ``owners=`` where they are.
    progress : optional
        As for `Store.reshard`.

    Returns
    -------
    Commit
        The first commit of the distributed store, with the step and the metadata of the store's last one.

    Raises
    ------
    ShardEmbError
        The store has no commit, or changes without one, or vocabularies, or frozen rows.
    StoreExistsError
        There is a store at `head` already, which this has not begun.
    TypeError, ValueError
        An argument is invalid.
    StoreNotFoundError, StoreLockedError, FormatError, DiskFullError, OSError
        As `shardemb.open` and `Store.reshard`.

    Examples
    --------
    >>> import shardemb
    >>> from shardemb.splitting import merge, split
    >>> with shardemb.open(tmp / "words.zarr") as store:
    ...     table = store.create_table("tokens", num_embeddings=100, embedding_dim=4)
    ...     commit = store.commit(step=7)
    >>> split(tmp / "words.zarr", tmp / "head.zarr", partitions=4).step
    7
    >>> sorted(path.name for path in (tmp / "head.zarr.partitions").iterdir())
    ['00000.zarr', '00001.zarr', '00002.zarr', '00003.zarr']
    >>> merge(tmp / "head.zarr", tmp / "one.zarr").step
    7
    """
    count = validation.count(partitions, "partitions", maximum=MAX_PARTITIONS)
    with contextlib.ExitStack() as stack:
        session = opening.open_session(store, "r+")
        source, whole = stack.enter_context(Store(session)), stack.enter_context(opening.open(head))
        record = _begun(whole, _places(_folder_of(whole, folder), count))
        parts: list[Partition] = []
        for number, (_, place) in enumerate(record.places):
            parts.append(
                stack.enter_context(_new_partition(place, PartitionIdentity(whole.uuid, number, count)))
            )
        stack.push(partial(_give_up, parts))
        spreading.spread(session, parts, progress)
        last = source.last_commit
        assert last is not None  # what has none was refused
        record = replace(
            record,
            decided=(1, (record.openings, str(uuid.uuid4()), 1)),
            complete=True,
            tables={name: _facts_of(table.spec) for name, table in session.shown_tables().items()},
            step=last.step,
            metadata=last.metadata,
        )
        for part in parts:
            part.prepare(record.decided, last.step, {"tables": record.tables, "metadata": last.metadata})
        whole.commit(last.step, record.to_json())  # from here on, all of it is committed
        for part in parts:
            part.decide()
        return replace(last, id=1)


def _give_up(parts: Sequence[Partition], kind: object, *_: object) -> None:
    """Drop what partitions have got, after an error: what is not prepared would be lost with a warning for each."""
    for part in parts if kind is not None else ():
        with contextlib.suppress(PartitionError):  # it was not opened, or has prepared
            part.store.rollback()


def _folder_of(head: Store, given: str | os.PathLike[str] | None) -> Path:
    if given is None:
        return head.path.with_name(f"{head.path.name}.partitions")
    return paths.local_path(given, "the folder of partitions").absolute()


def _places(folder: Path, count: int) -> Places:
    return tuple(("", str(folder / partition_name(part))) for part in range(count))


def _begun(head: Store, places: Places) -> Record:
    """Return what the head of a store without a commit says; it says it from now on.

    Raises
    ------
    StoreExistsError
        There is a commit, or it was begun with other places.
    """
    record = Record(places)
    if head.last_commit is not None:
        record = Record.of(head.last_commit, head.path)
        if record.decided[0] or record.places != places:
            msg = f"there is a store at {head.path}; choose a new folder for the head"
            raise StoreExistsError(msg)
    record = replace(record, openings=record.openings + 1)
    head.commit(metadata=record.to_json())
    return record


def _new_partition(path: str, identity: PartitionIdentity) -> Partition:
    """Create a partition, or hold one that another call has created."""
    try:
        return Partition.create(path, identity)
    except StoreExistsError:
        held = Partition.hold(path)
    if (held.identity, held.status.commit) != (identity, 0):
        held.close()
        msg = f"{path} is {held.identity}, where {identity} should be created; choose another folder"
        raise PartitionError(msg)
    return held


def _facts_of(spec: TableSpec) -> dict[str, Any]:
    """Return what no partition knows of a table."""
    return {
        "num_embeddings": spec.num_embeddings,
        "padding_idx": spec.padding_idx,
        "counters": spec.counters,
    }


def merge(
    head: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress = None,
) -> Commit:
    """Make a store of one machine with the tables of a distributed one, as of its last commit: the reverse of `split`.

    Parameters
    ----------
    head : path-like
        The head of the distributed store, which nobody has open.
    store : path-like
        A new folder.
    folder : path-like, optional
        Where all partitions are now, on this machine. By default where the head says.
    progress : optional
        As for `split`.

    Returns
    -------
    Commit
        The first of the new store, with step and metadata of the distributed store's last one.

    Raises
    ------
    PartitionError
        A partition is missing, belongs elsewhere, or is at another commit; or there is no commit.
    StoreExistsError
        There is a store with tables at `store`.
    StoreNotFoundError, StoreLockedError, FormatError, DiskFullError, OSError
        As `split`.
    """
    with opening.open(head, "r+") as whole, contextlib.ExitStack() as stack:
        record = Record.of(whole.last_commit, whole.path)
        if record.decided[0] == 0:
            msg = f"the store {whole.path} has no commit, so there is nothing to merge"
            raise PartitionError(msg)
        places = record.places
        if folder is not None:
            places = _places(paths.local_path(folder, "the folder of partitions").absolute(), len(places))
        parts: list[Partition] = []
        for number, (_, place) in enumerate(places):
            parts.append(
                stack.enter_context(_held(place, PartitionIdentity(whole.uuid, number, len(places))))
            )
            parts[-1].open(record.decided)
        session = opening.open_session(store, "a")
        target = stack.enter_context(Store(session))
        if target.last_commit is not None or len(target):
            msg = f"there is a store at {target.path}; choose a new folder"
            raise StoreExistsError(msg)
        shapes = {name: (each["num_embeddings"], each["padding_idx"]) for name, each in record.tables.items()}
        spreading.gather(parts, session, shapes, progress)
        return target.commit(record.step, record.metadata)


def _held(path: str, identity: PartitionIdentity) -> Partition:
    try:
        held = Partition.hold(path)
    except StoreNotFoundError as error:
        msg = f"{identity} is missing: there is none at {path}; folder= says where partitions are"
        raise PartitionError(msg) from error
    if held.identity != identity:
        held.close()
        msg = f"{path} is {held.identity}, where {identity} should be"
        raise PartitionError(msg)
    return held
