"""Tags: commits that are kept under a name. On disk, a folder each; the base says which of them count.

::

    .shardemb/tags/UUID/
      zarr.json, NAME/           as in a store: tables with links to their files, and with checksums of their own
      .shardemb/tag.json         the manifest of the commit
      .shardemb/undo             what was overwritten of these files since, see ``undo.py``
      .shardemb/vocabularies/    links to the files of the indexes

The links cost nothing, and keep files of tables that the store has dropped since. A folder that the base does not name
is nothing: it is removed by the next opening.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.commits import undo
from shardemb.errors import FormatError, ShardEmbError, TagNotFoundError
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.format.table_files import TableLocation
from shardemb.storage import checksums, files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.manifest import TagEntry


def find(store: Path, tags: Collection[TagEntry], name: str) -> TagEntry:
    """Return the tag of a name.

    Raises
    ------
    TagNotFoundError
        There is none.
    """
    found = next((each for each in tags if each.name == name), None)
    if found is None:
        names = ", ".join(repr(each.name) for each in tags) or "none"
        msg = f"the store {store} has no tag {name!r}; its tags: {names}"
        raise TagNotFoundError(msg)
    return found


def make(store: Path, uuid: str, commit: Manifest, tables: Mapping[str, TableLocation]) -> Path:
    """Make the folder of a tag, durably, while the files of the tables are exactly what the commit says; return it.

    Parameters
    ----------
    store : Path
    uuid : str
        The new tag's.
    commit : Manifest
        Of the last commit.
    tables : mapping of str to TableLocation
        The tables of the commit by uuid.

    Raises
    ------
    ShardEmbError
        The file system has no hard links, or a file has as many as it may have. Nothing is left of the tag.
    DiskFullError, OSError
        The same.
    """
    folder = store_paths.tag(store, uuid)
    try:
        files.make_directory(store_paths.private(folder))
        files.write_new(folder / zarr_metadata.DOCUMENT, files.read(store / zarr_metadata.DOCUMENT))
        for entry in commit.tables:
            _link_table(tables[entry.uuid], TableLocation(tables[entry.uuid].spec, folder / entry.name))
        for vocabulary in commit.vocabularies:
            source = store_paths.index(store, vocabulary.uuid)
            target = store_paths.index(folder, vocabulary.uuid)
            parts = [path for path in files.entries(source) if path.suffix != ".tmp"]
            files.make_directory(target)
            folders.carry([(path, target / path.name) for path in parts], share=True)
        undo.create(folder)
        held = Manifest(
            uuid=commit.uuid,
            clean=True,
            commit=commit.commit,
            tables=commit.tables,
            vocabularies=commit.vocabularies,
            partition=commit.partition,
            decision=commit.decision,
        )
        files.write_new(store_paths.tag_manifest(folder), held.to_bytes())
        files.sync_tree(folder)
    except BaseException:
        files.remove_tree(folder)
        raise
    return folder


def _link_table(old: TableLocation, new: TableLocation) -> None:
    table_folder.write_documents(new.directory, folders.documents(old.directory))
    for source, target in zip(old.files(), new.files(), strict=True):
        if not files.link(source.path, target.path):
            msg = (
                f"{source.path} cannot get a second name (a hard link), which a tag needs: the file system has none, "
                f"or the file has as many as it may have; use store.copy() instead"
            )
            raise ShardEmbError(msg)
    nbytes = files.size(old.checksums_path) or 0
    files.create_sparse(new.checksums_path, nbytes)
    folders.copy_data(old.checksums_path, new.checksums_path, nbytes)


def read_manifest(folder: Path) -> Manifest:
    """Read what the commit of a tag was.

    Raises
    ------
    FormatError
        It is missing or damaged.
    """
    path = store_paths.tag_manifest(folder)
    try:
        return Manifest.from_bytes(files.read(path))
    except (OSError, ValueError) as error:
        msg = f"{path}: {error}"
        raise FormatError(msg) from error


def locations(folder: Path, held: Manifest) -> list[TableLocation]:
    """Return the tables in the folder of a tag, in the order of its manifest.

    Raises
    ------
    FormatError
        One is missing or damaged.
    """
    found = folders.locate(folder, held.tables)
    tables = []
    for entry in held.tables:
        directory = found[entry.uuid]
        with table_folder.naming(entry.name, directory):
            tables.append(TableLocation(table_folder.spec_of(directory, may_miss=False), directory))
    return tables


def keeper(store: Path, tag: TagEntry) -> undo.Keeper:
    """Open a tag for keeping; raises what `read_manifest` and `locations` raise."""
    folder = store_paths.tag(store, tag.uuid)
    return undo.Keeper(folder, locations(folder, read_manifest(folder)))


def discard(folder: Path) -> None:
    """Remove the folder of a tag that the base does not name any more, and tell readers that nothing is kept."""
    release(folder)
    files.remove_tree(folder)


def release(folder: Path) -> None:
    """Tell readers of a tag that what it has is not kept any more."""
    path = store_paths.undo(folder)
    # One with another name belongs to a copy of the store too, made with ``cp -al``.
    if files.size(path) is not None and files.names(path)[0] == 1:
        with files.opened(path, os.O_WRONLY) as descriptor:
            released = undo.RELEASED.to_bytes(8, "little", signed=True)
            files.write(descriptor, released, undo.COUNT, path)


def sweep(store: Path, tags: Collection[TagEntry]) -> None:
    """Remove every folder of a tag but those of some."""
    uuids = {each.uuid for each in tags}
    for path in files.entries(store_paths.tags(store)):
        if path.name not in uuids:
            discard(path)


def bytes_kept(folder: Path) -> int:
    """Bytes of disk space that only a tag takes."""
    return sum(files.allocated(path) for path in files.walk(folder) if files.names(path)[0] == 1)


# ---- looking back ---------------------------------------------------------------------------------------------


def kept_sums(folder: Path) -> dict[int, tuple[Int64Array, NDArray[np.uint64]]]:
    """Return for each table, by its position in the manifest, the blocks that are kept and the checksums of those."""
    found: dict[int, list[tuple[Int64Array, NDArray[np.uint64]]]] = {}
    for records in undo.read(folder):
        for table, blocks, content in by_table(records):
            found.setdefault(table, []).append((blocks, checksums.block_sums(content.reshape(-1).data)))
    joined = {}
    for table, parts in found.items():
        blocks, first = np.unique(np.concatenate([each for each, _ in parts]), return_index=True)
        joined[table] = blocks, np.concatenate([each for _, each in parts])[first]
    return joined


def by_table(records: NDArray[np.void]) -> Iterator[tuple[int, Int64Array, NDArray[np.uint8]]]:
    """Split records by table: yields its position in the manifest, its blocks, and their content (blocks, PAGE)."""
    for table in np.unique(records["table"]).tolist():
        some = records[records["table"] == table]
        yield table, some["block"].astype(np.int64), np.ascontiguousarray(some["content"])


def put_back(folder: Path, pairs: Mapping[int, tuple[TableLocation, TableLocation]]) -> None:
    """Write what a tag has kept into copies of its tables, with the checksums of then, durably.

    Parameters
    ----------
    folder : Path
        The tag's.
    pairs : mapping of int to two TableLocation
        By the position in the manifest: a table in the tag, and its copy.
    """
    written = set()
    for records in undo.read(folder):
        for number, blocks, content in by_table(records):
            if number not in pairs:
                continue
            old, new = pairs[number]
            for file in new.files():
                inside = (blocks >= file.first) & (blocks < file.first + file.nbytes // PAGE)
                some = blocks[inside] - file.first
                if not some.size:
                    continue
                written.add(file.path)
                with files.opened(file.path, os.O_WRONLY) as descriptor:
                    for block, data in zip(some.tolist(), content[inside], strict=True):
                        files.write(descriptor, data.data, block * PAGE, file.path)
    for path in sorted(written):
        files.sync_file(path)
    for number, (blocks, _) in kept_sums(folder).items():
        if number in pairs:
            old, new = pairs[number]
            sums = checksums.read_sums(old.checksums_path, 0, old.spec.num_blocks)
            checksums.write_sums(new.checksums_path, blocks, sums[blocks])
