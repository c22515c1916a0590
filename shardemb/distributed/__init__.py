"""One store over several machines, on dask.distributed: the same tables, one commit for all of them.

A table's rows are spread over *partitions*, each an ordinary store in a folder of an *owner*, which is a worker of a
dask cluster. The *head*, a small store at the path that the user names, says which commit is the last one.
[Several machines](../../docs/how-to/several-machines.md) says how to set it up.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from shardemb.base import paths, validation
from shardemb.distributed.clusters import local_cluster
from shardemb.distributed.head import Coordinator
from shardemb.distributed.owner import Owner
from shardemb.distributed.store import DistributedStore
from shardemb.distributed.table import DistributedTable
from shardemb.distributed.transport import Wire
from shardemb.errors import StoreNotFoundError
from shardemb.format.manifest import MAX_PARTITIONS
from shardemb.protocol.record import Places, Record, partition_name
from shardemb.splitting import merge, split
from shardemb.store import opening

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import distributed

    from shardemb.store.store import Store

__all__ = ["DistributedStore", "DistributedTable", "local_cluster", "merge", "open", "split"]


def open(
    client: distributed.Client,
    path: str | os.PathLike[str],
    *,
    owners: Mapping[str, str | os.PathLike[str]] | None = None,
    partitions: int | None = None,
    mode: Literal["a", "r+", "w-"] = "a",
    deadline_s: float = 60.0,
    recover_s: float = 60.0,
) -> DistributedStore:
    """Open a distributed store, or create one.

    Parameters
    ----------
    client : distributed.Client
        Of the cluster whose workers are the owners.
    path : path-like
        The folder of the head, on a disk of this machine.
    owners : mapping of str to path-like, optional
        The name of a worker, its address, or its host if it is the only worker there; and a folder on that machine for
        its partitions. They are dealt out in turn. Needed to create a store. Later on it may be left out; or it says
        where the partitions are now, after their folders were moved.
    partitions : int, optional
        Number of partitions, 16 by default, fixed for the life of the store. More than owners, so that owners can be
        added later.
    mode : {"a", "r+", "w-"}
        As for `shardemb.open`: create a missing store, require one, or refuse one.
    deadline_s : float
        Seconds that an owner has for a call, before it counts as lost.
    recover_s : float
        Seconds in which owners have to come back, when the store is opened or after one was lost.

    Returns
    -------
    DistributedStore
        Close it, or use it as a context manager.

    Raises
    ------
    TypeError, ValueError
        An argument is invalid, or not what the store was created with.
    StoreNotFoundError, StoreExistsError, StoreLockedError, FormatError
        As `shardemb.open`, of the head; or what is there is no distributed store.
    OwnerLostError
        A worker is not there.
    PartitionError
        A partition is missing, belongs to another store, or is at another commit; the message says where.

    Warns
    -----
    RuntimeWarning
        Workers have a memory limit, or an allocator that makes lookups slow. The message has the line to set.

    Notes
    -----
    One process has the store open. Whoever can reach a port of the cluster can run programs on its machines, which is a
    property of dask: use TLS, or a network of your own.

    Examples
    --------
    >>> import shardemb.distributed
    >>> from distributed import Client
    >>> client = Client("tcp://scheduler:8786")  # doctest: +SKIP
    >>> owners = {"node-1": "/nvme/words", "node-2": "/nvme/words"}
    >>> with shardemb.distributed.open(client, "words.zarr", owners=owners) as store:  # doctest: +SKIP
    ...     table = store.create_table("tokens", num_embeddings=10**9, embedding_dim=128)
    ...     commit = store.commit(step=0)
    """
    if mode not in ("a", "r+", "w-"):
        msg = f"mode must be 'a', 'r+' or 'w-', got {mode!r}"
        raise ValueError(msg)
    wire = Wire(client)
    seconds = [
        validation.number(each, name) for each, name in ((deadline_s, "deadline_s"), (recover_s, "recover_s"))
    ]
    count = 16 if partitions is None else validation.count(partitions, "partitions", maximum=MAX_PARTITIONS)
    given = None if owners is None else _places(owners, count)
    head = opening.open(path, mode)
    try:
        if head.last_commit is None:
            record = _first_record(head, given)
        else:
            record = _known_record(head, partitions)
            given = None if owners is None else _places(owners, len(record.places))
        client.register_plugin(Owner())
        coordinator = Coordinator(head, wire, record, given, deadline_s=seconds[0], recover_s=seconds[1])
    except BaseException:
        head.close()
        raise
    for complaint in coordinator.complaints():
        warnings.warn(complaint, RuntimeWarning, stacklevel=2)
    return DistributedStore(coordinator.link.members, coordinator.link.tables, coordinator)


def _first_record(head: Store, places: Places | None) -> Record:
    if places is None:
        msg = f"there is no store at {head.path}; to create one, say where its partitions go: owners={{worker: folder}}"
        raise StoreNotFoundError(msg)
    return Record(places)


def _known_record(head: Store, partitions: int | None) -> Record:
    record = Record.of(head.last_commit, head.path)
    count = len(record.places)
    if partitions is not None and partitions != count:
        msg = f"the store {head.path} has {count} partitions, which is fixed; got partitions={partitions}"
        raise ValueError(msg)
    return record


def _places(owners: Mapping[str, str | os.PathLike[str]], count: int) -> Places:
    """Deal partitions out to owners in turn; return the owner and the folder of each."""
    if not owners:
        msg = "owners must name at least one worker and its folder, got none"
        raise ValueError(msg)
    named = [(str(name), paths.local_path(folder, "an owner's folder")) for name, folder in owners.items()]
    return tuple(
        (name, str(folder / partition_name(part)))
        for part, (name, folder) in ((part, named[part % len(named)]) for part in range(count))
    )
