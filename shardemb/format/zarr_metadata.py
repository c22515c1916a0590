"""The zarr v3 metadata of a store. No other module imports zarr.

zarr writes and reads the metadata documents in memory; other modules put them on disk. So every byte that reaches the
disk goes through ``files.py``, and a table's documents can be checked before anything is mapped. Documents that are as
zarr wrote them, by their checksum, are not checked by zarr again, so opening a store does not import it.

::

    zarr.json                 group: attributes.shardemb = {format_version, uuid}
    NAME/zarr.json            group: attributes.shardemb = TableSpec, and a checksum of it and the documents below
    NAME/rows/zarr.json       float32 (num_embeddings, width), chunks (rows_per_shard, width), keys "c.17.0";
                              uint8 if a record is anything else than float32
    NAME/present/zarr.json    uint8, one bit per row; only if a fresh record is not all zero bytes
    NAME/checks/zarr.json     uint64, one checksum per block of 4,096 bytes of the files above
"""

from __future__ import annotations

import json
import zlib
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from shardemb.base.sizes import PAGE, round_up
from shardemb.errors import FormatError
from shardemb.format.documents import FORMAT_VERSION, crc32, field, parse_json, require_version, uuid_field
from shardemb.format.spec import TableSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zarr.core.metadata import ArrayV3Metadata

ATTRIBUTE = "shardemb"
DOCUMENT = "zarr.json"
ARRAYS = ROWS, PRESENT, CHECKS = "rows", "present", "checks"


def shard_key(shard: int) -> str:
    """File name of a row-shard within the table's ``rows`` folder."""
    return f"c.{shard}.0"


def presence_key(chunk: int) -> str:
    """File name of a chunk of the presence bitmap within the table's ``present`` folder."""
    return f"c.{chunk}"


def store_documents(uuid: str, before: bytes = b"") -> dict[str, bytes]:
    """Return the documents of an empty store, by path relative to the store.

    The attributes that other programs have added to the document `before` stay.
    """
    return _group_document({"format_version": FORMAT_VERSION, "uuid": uuid}, before)


def table_documents(spec: TableSpec, before: Mapping[str, bytes] = MappingProxyType({})) -> dict[str, bytes]:
    """Return the documents of a table, by path relative to the table's folder.

    The attributes that other programs have added to the documents `before` stay.
    """
    documents = _array_documents(spec)
    for path, document in documents.items():
        if added := _added_attributes(before.get(path, b"")):
            documents[path] = _with_attributes(document, added | parse_json(document)["attributes"])
    attributes = spec.to_json()
    attributes["arrays_crc32"] = _arrays_crc32(attributes, documents)
    group = _group_document(attributes | {"crc32": crc32(attributes)}, before.get(DOCUMENT, b""))
    return group | documents


def _group_document(attributes: Mapping[str, object], before: bytes) -> dict[str, bytes]:
    added = _added_attributes(before)
    return {DOCUMENT: _with_attributes(_group_without_attributes(), added | {ATTRIBUTE: dict(attributes)})}


@cache
def _group_without_attributes() -> bytes:
    import zarr
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    zarr.create_group(MemoryStore(memory), zarr_format=3)
    return _document_in(memory)


def _with_attributes(document: bytes, attributes: Mapping[str, object]) -> bytes:
    """Return a document with other attributes, written as zarr would."""
    return json.dumps(parse_json(document) | {"attributes": attributes}, indent=2).encode()


def _added_attributes(document: bytes) -> dict[str, Any]:
    """Return the attributes in a group's or array's document that are not this package's."""
    try:
        attributes: dict[str, Any] = field(parse_json(document), "attributes", dict)
    except FormatError:
        return {}
    return {name: value for name, value in attributes.items() if name != ATTRIBUTE}


def _array_documents(spec: TableSpec) -> dict[str, bytes]:
    attributes = {ATTRIBUTE: {"uuid": spec.uuid}}  # exposes a folder mixed from two tables
    arrays = [
        _Array(
            ROWS,
            spec.element.name,
            (spec.num_embeddings, spec.width),
            (spec.rows_per_shard, spec.width),
            ("row", "byte" if spec.precision.is_coded else "column"),
        ),
        _Array(PRESENT, "uint8", (spec.presence_bytes,), (spec.presence_chunk_bytes,), ("byte",)),
        _Array(CHECKS, "uint64", (spec.num_blocks,), (round_up(spec.num_blocks, PAGE // 8),), ("block",)),
    ]
    return {
        f"{array.name}/{DOCUMENT}": _with_attributes(_array_without_attributes(array), attributes)
        for array in arrays
        if spec.has_presence or array.name != PRESENT
    }


class _Array(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dimensions: tuple[str, ...]


@lru_cache(maxsize=1024)  # zarr takes 2 ms, and many tables of a store have the same shape
def _array_without_attributes(array: _Array) -> bytes:
    import zarr
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(memory),
        shape=array.shape,
        chunks=array.chunks,
        dtype=array.dtype,
        fill_value=0,
        filters=None,
        compressors=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=array.dimensions,
        zarr_format=3,
    )
    return _document_in(memory)


def store_uuid(document: bytes) -> str:
    """Read the uuid of a store from its group's document.

    Raises
    ------
    FormatError
        The document is not that of a shardemb group, or its format is newer.
    """
    attributes = _attributes(document)
    require_version(attributes)
    return uuid_field(attributes)


def table_uuid(document: bytes) -> str | None:
    """Read the uuid of a table from its group's document; None if it is not a shardemb table."""
    try:
        uuid = _attributes(document).get("uuid")
    except FormatError:
        return None
    return uuid if isinstance(uuid, str) else None


def table_spec(documents: Mapping[str, bytes]) -> TableSpec:
    """Read a table's spec from its documents, and check that the arrays agree with it.

    Raises
    ------
    FormatError
        A document is missing or damaged; shapes, chunks, codecs or dtypes disagree with the spec.
    """
    return _table_spec(tuple(documents.items()))


@lru_cache(maxsize=1024)  # a check by zarr takes milliseconds, and opening a store asks several times
def _table_spec(items: tuple[tuple[str, bytes], ...]) -> TableSpec:
    documents = dict(items)
    attributes = _attributes(documents.get(DOCUMENT, b""))
    spec = TableSpec.from_json(attributes)
    if attributes.get("arrays_crc32") != _arrays_crc32(attributes, documents):
        # Another program has written one of the documents, or the store is so old that it has no checksum.
        _check_arrays(spec, documents)
    return spec


def _check_arrays(spec: TableSpec, documents: Mapping[str, bytes]) -> None:
    for path, document in _array_documents(spec).items():
        name = path.removesuffix("/" + DOCUMENT)
        expected, found = _metadata(document), _metadata(documents.get(path, b""))
        for what in ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"):
            if getattr(found, what) != getattr(expected, what):
                wanted = getattr(expected, what)
                msg = f"array {name!r} has {what} {getattr(found, what)}, but the table needs {wanted}"
                raise FormatError(msg)
        if not isinstance(found.attributes, dict) or found.attributes.get(ATTRIBUTE) != {"uuid": spec.uuid}:
            msg = f"array {name!r} belongs to another table, or to none"
            raise FormatError(msg)


def _arrays_crc32(attributes: Mapping[str, object], documents: Mapping[str, bytes]) -> int:
    """Return the checksum of the documents of a table's arrays, seeded with that of the table's attributes.

    So it changes with either, and documents of one table do not pass as those of another.
    """
    described = {name: value for name, value in attributes.items() if name != "arrays_crc32"}
    arrays = b"".join(documents[path] for path in sorted(documents) if path != DOCUMENT)
    return zlib.crc32(arrays, crc32(described))


def _attributes(document: bytes) -> dict[str, Any]:
    group = parse_json(document)
    if group.get("zarr_format") != 3 or group.get("node_type") != "group":
        msg = "its zarr.json is not that of a zarr v3 group"
        raise FormatError(msg)
    attributes: dict[str, Any] = field(field(group, "attributes", dict), ATTRIBUTE, dict)
    return attributes


def _metadata(document: bytes) -> ArrayV3Metadata:
    from zarr.core.metadata import ArrayV3Metadata

    try:
        return ArrayV3Metadata.from_dict(parse_json(document))
    except FormatError:
        raise
    except Exception as error:
        # zarr's parsers raise errors of many types: KeyError, TypeError, zarr's own.
        msg = f"zarr refuses the metadata of an array: {type(error).__name__}: {error}"
        raise FormatError(msg) from error


def _document_in(memory: dict[str, Any]) -> bytes:
    document: bytes = memory[DOCUMENT].to_bytes()
    return document
