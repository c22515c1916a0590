import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from support.references import damaged, damaged_bytes
from support.specs import make
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from shardemb.base import sizes
from shardemb.errors import FormatError
from shardemb.format import zarr_metadata
from shardemb.format.documents import crc32
from shardemb.initializers import Uniform
from shardemb.optim import Adam

UUID = "0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c11"
PLAIN = make(num_embeddings=1000, dim=6, optimizer=Adam())
WITH_PRESENCE = make(num_embeddings=10**8, dim=6, initializer=Uniform(-1, 1, seed=3))
TABLES = pytest.mark.parametrize("table", [PLAIN, WITH_PRESENCE], ids=["plain", "presence"])


def as_json(documents):
    return {path: json.loads(data) for path, data in documents.items()}


def as_bytes(documents):
    return {path: json.dumps(document).encode() for path, document in documents.items()}


def opened(documents):
    """The group as zarr itself opens it."""
    store = MemoryStore()
    buffer = default_buffer_prototype().buffer
    for path, data in documents.items():
        asyncio.run(store.set(path, buffer.from_bytes(data)))
    return zarr.open_group(store, mode="r", zarr_format=3)


# ---- the documents of a store -----------------------------------------------------------------------------------


def test_a_store_is_a_zarr_group_with_its_uuid():
    documents = zarr_metadata.store_documents(UUID)
    assert list(documents) == ["zarr.json"]
    assert dict(opened(documents).attrs) == {"shardemb": {"format_version": 1, "uuid": UUID}}
    assert zarr_metadata.store_uuid(documents["zarr.json"]) == UUID


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zarr_format": 2}, "not that of a zarr v3 group"),
        ({"node_type": "array"}, "not that of a zarr v3 group"),
        ({"attributes": None}, "attributes is None"),
        ({"attributes": {}}, "shardemb is None"),
        ({"attributes": {"shardemb": []}}, "shardemb is"),
        ({"attributes": {"shardemb": {"format_version": 2, "uuid": UUID}}}, "newer than 1"),
        ({"attributes": {"shardemb": {"format_version": 1}}}, "uuid is None"),
        ({"attributes": {"shardemb": {"format_version": 1, "uuid": "../x"}}}, "uuid is"),
    ],
)
def test_anything_but_the_document_of_a_store_is_a_format_error(change, message):
    document = json.loads(zarr_metadata.store_documents(UUID)["zarr.json"]) | change
    with pytest.raises(FormatError, match=message):
        zarr_metadata.store_uuid(json.dumps(document).encode())


@given(damaged_bytes(zarr_metadata.store_documents(UUID)["zarr.json"]))
def test_a_damaged_group_is_a_format_error_or_the_group(data):
    try:
        assert len(zarr_metadata.store_uuid(data)) == 36
    except FormatError:
        assert zarr_metadata.table_uuid(data) is None or isinstance(zarr_metadata.table_uuid(data), str)


# ---- the documents of a table -----------------------------------------------------------------------------------


@TABLES
def test_documents_contain_the_spec(table):
    assert zarr_metadata.table_spec(zarr_metadata.table_documents(table)) == table
    assert zarr_metadata.table_uuid(zarr_metadata.table_documents(table)["zarr.json"]) == table.uuid


def test_rows_are_as_the_format_specifies():
    rows = as_json(zarr_metadata.table_documents(PLAIN))["rows/zarr.json"]
    assert rows["shape"] == [1000, 18]
    assert rows["data_type"] == "float32"
    assert rows["chunk_grid"]["configuration"]["chunk_shape"] == [PLAIN.rows_per_shard, 18]
    assert rows["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    assert rows["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    assert rows["fill_value"] == 0.0
    assert rows["dimension_names"] == ["row", "column"]


def test_the_presence_bitmap_is_as_the_format_specifies():
    present = as_json(zarr_metadata.table_documents(WITH_PRESENCE))["present/zarr.json"]
    assert present["shape"] == [WITH_PRESENCE.presence_bytes] == [12_500_000]
    assert present["data_type"] == "uint8"
    assert present["chunk_grid"]["configuration"]["chunk_shape"] == [WITH_PRESENCE.presence_chunk_bytes]
    assert present["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "."}}
    assert present["codecs"] == [{"name": "bytes"}]
    assert present["fill_value"] == 0


def test_a_table_of_zeros_has_no_presence_bitmap():
    assert set(zarr_metadata.table_documents(PLAIN)) == {"zarr.json", "rows/zarr.json", "checks/zarr.json"}
    documents = set(zarr_metadata.table_documents(WITH_PRESENCE))
    assert documents == {"zarr.json", "rows/zarr.json", "present/zarr.json", "checks/zarr.json"}


@TABLES
def test_zarr_opens_the_documents(table):
    group = opened(zarr_metadata.table_documents(table))
    assert group["rows"].shape == (table.num_embeddings, table.width)
    assert group["rows"].dtype == np.float32
    assert not group["rows"][:3].any()
    attributes = dict(group.attrs["shardemb"])
    assert attributes.pop("crc32") == crc32(attributes)
    assert attributes.pop("arrays_crc32") > 0
    assert attributes | {"crc32": crc32(attributes)} == json.loads(json.dumps(table.to_json()))


def test_files_are_where_zarr_looks_for_them(tmp_path):
    table = make(num_embeddings=300, dim=16, rows_per_shard=64, initializer=Uniform(0, 1))
    for path, data in zarr_metadata.table_documents(table).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    group = zarr.open_group(tmp_path, mode="r+")
    group["rows"][:] = 1
    group["present"][:] = 255
    files = {path.name for path in (tmp_path / zarr_metadata.ROWS).iterdir()} - {zarr_metadata.DOCUMENT}
    assert files == {zarr_metadata.shard_key(shard) for shard in range(table.num_shards)}
    assert (tmp_path / zarr_metadata.ROWS / zarr_metadata.shard_key(0)).stat().st_size == table.shard_bytes
    assert {path.name for path in (tmp_path / zarr_metadata.PRESENT).iterdir()} == {
        zarr_metadata.DOCUMENT,
        zarr_metadata.presence_key(0),
    }
    assert (
        tmp_path / zarr_metadata.PRESENT / zarr_metadata.presence_key(0)
    ).stat().st_size == table.presence_chunk_bytes


@TABLES
def test_a_missing_document_is_a_format_error(table):
    for path in zarr_metadata.table_documents(table):
        documents = zarr_metadata.table_documents(table)
        del documents[path]
        with pytest.raises(FormatError):
            zarr_metadata.table_spec(documents)


CHANGES = [
    ("rows/zarr.json", {"shape": [1001, 18]}, "shape"),
    ("rows/zarr.json", {"shape": [1000, 17]}, "shape"),
    ("rows/zarr.json", {"data_type": "float64"}, "data_type"),
    (
        "rows/zarr.json",
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [64, 18]}}},
        "chunk_grid",
    ),
    (
        "rows/zarr.json",
        {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}},
        "chunk_key",
    ),
    ("rows/zarr.json", {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}, "codecs"),
    (
        "rows/zarr.json",
        {
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "gzip", "configuration": {"level": 1}},
            ]
        },
        "codecs",
    ),
    ("rows/zarr.json", {"fill_value": 1.0}, "fill_value"),
    ("rows/zarr.json", {"zarr_format": 2}, "zarr refuses"),
    ("rows/zarr.json", {"node_type": "group"}, "zarr refuses"),
    ("rows/zarr.json", {"codecs": []}, "zarr refuses"),
    ("rows/zarr.json", {"data_type": "float33"}, "zarr refuses"),
    ("zarr.json", {"node_type": "array"}, "not that of a zarr v3 group"),
    ("zarr.json", {"attributes": {}}, "shardemb is None"),
]


@pytest.mark.parametrize(("path", "change", "message"), CHANGES)
def test_an_array_that_disagrees_with_the_spec_is_a_format_error(path, change, message):
    documents = as_json(zarr_metadata.table_documents(PLAIN))
    documents[path] |= change
    with pytest.raises(FormatError, match=message):
        zarr_metadata.table_spec(as_bytes(documents))


@TABLES
def test_unchanged_documents_are_not_checked_by_zarr(table, monkeypatch):
    documents = zarr_metadata.table_documents(table)
    monkeypatch.setattr(zarr_metadata, "_check_arrays", lambda *_: pytest.fail("asked zarr"))
    assert zarr_metadata.table_spec(documents) == table


@pytest.mark.parametrize("recorded", [0, None, "no number"])
def test_documents_without_a_matching_checksum_are_checked_by_zarr(recorded, monkeypatch):
    """For example those of the first stores, which have no checksum."""
    asked = []
    monkeypatch.setattr(zarr_metadata, "_check_arrays", lambda table, _: asked.append(table))
    documents = as_json(zarr_metadata.table_documents(PLAIN))
    attributes = documents["zarr.json"]["attributes"]["shardemb"]
    attributes["arrays_crc32"] = recorded
    attributes["crc32"] = crc32(attributes)
    assert zarr_metadata.table_spec(as_bytes(documents)) == PLAIN
    assert asked == [PLAIN]


def test_attributes_that_another_program_changed_are_checked_against_the_arrays():
    documents = as_json(zarr_metadata.table_documents(PLAIN))
    attributes = documents["zarr.json"]["attributes"]["shardemb"]
    attributes["num_embeddings"] += 1
    attributes["crc32"] = crc32(attributes)
    with pytest.raises(FormatError, match="array 'rows' has shape"):
        zarr_metadata.table_spec(as_bytes(documents))


def test_attributes_that_another_program_adds_are_ignored():
    documents = as_json(zarr_metadata.table_documents(PLAIN))
    documents["zarr.json"]["attributes"]["theirs"] = {"a": 1}
    documents["rows/zarr.json"]["attributes"]["units"] = "m"
    assert zarr_metadata.table_spec(as_bytes(documents)) == PLAIN


def test_arrays_of_another_table_are_refused():
    documents = zarr_metadata.table_documents(PLAIN)
    other = zarr_metadata.table_documents(replace(PLAIN, uuid="1" * 8 + PLAIN.uuid[8:]))
    documents["rows/zarr.json"] = other["rows/zarr.json"]
    with pytest.raises(FormatError, match="array 'rows' belongs to another table"):
        zarr_metadata.table_spec(documents)


@settings(max_examples=300)
@given(damaged(as_json(zarr_metadata.table_documents(make(optimizer=Adam(), initializer=Uniform(0, 1))))))
def test_damaged_documents_are_a_format_error_or_a_spec(documents):
    documents = as_bytes(documents)
    try:
        table = zarr_metadata.table_spec(documents)
    except FormatError:
        return
    assert table.shard_bytes % sizes.PAGE == 0


@pytest.mark.parametrize("name", ["num_embeddings", "embedding_dim", "rows_per_shard"])
def test_the_largest_sizes_are_a_format_error_and_allocate_nothing(name):
    """Metadata can hold anything; nothing may be allocated before it is checked."""
    documents = as_json(zarr_metadata.table_documents(make()))
    documents["zarr.json"]["attributes"]["shardemb"] |= {
        "num_embeddings": 2**48,
        "embedding_dim": 2**16,
        "rows_per_shard": 2**48,
        "columns": {"weight": [0, 2**16]},
    }
    documents["zarr.json"]["attributes"]["shardemb"][name] = 64
    with pytest.raises(FormatError):
        zarr_metadata.table_spec(as_bytes(documents))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", zarr_metadata.table_documents(PLAIN)["rows/zarr.json"]]
)
def test_a_document_of_no_shardemb_group_has_no_uuid(data):
    assert zarr_metadata.table_uuid(data) is None
