import contextlib
import dataclasses
import json
import math
import os
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references import HOSTILE, damaged, damaged_bytes
from support.specs import UUID, make

from shardemb import dtypes
from shardemb.base import sizes
from shardemb.base.sizes import PAGE
from shardemb.errors import FormatError
from shardemb.format import documents, spec
from shardemb.format.spec import TableSpec, choose_rows_per_shard, shard_rows_multiple
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

MiB = 2**20
OPTIMIZERS = [None, SGD(), Adagrad(), Adagrad(initial_accumulator_value=0.5), RowWiseAdagrad(), Adam()]


# ---- the record -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "columns"),
    [
        (None, {"weight": (0, 6)}),
        (SGD(), {"weight": (0, 6)}),
        (RowWiseAdagrad(), {"weight": (0, 6), "sum": (6, 7)}),
        (Adagrad(), {"weight": (0, 6), "sum": (6, 12)}),
        (Adam(), {"weight": (0, 6), "exp_avg": (6, 12), "exp_avg_sq": (12, 18)}),
    ],
    ids=str,
)
def test_the_record_is_the_weight_and_then_each_state_column(optimizer, columns):
    table = make(optimizer=optimizer)
    assert list(table.columns.items()) == list(columns.items())
    assert table.width == max(stop for _, stop in columns.values())
    assert table.record_bytes == 4 * table.width


def test_a_table_without_optimizer_is_exactly_its_weight_matrix():
    assert make(dim=5).record_bytes == 20


def test_a_row_of_padding_is_named_where_there_is_one():
    table = dataclasses.replace(make(), padding_idx=3)
    assert TableSpec.from_json(table.to_json()) == table
    assert "padding_idx" not in make().to_json()
    for wrong in (-1, table.num_embeddings, True, "1", 1.5, None):
        document = {**make().to_json(), "padding_idx": wrong}
        document["crc32"] = documents.crc32(document)
        with pytest.raises(FormatError, match="padding_idx"):
            TableSpec.from_json(document)


def test_initial_state_comes_from_the_optimizer():
    assert make(dim=2, optimizer=Adagrad(initial_accumulator_value=0.5)).initial_state.tolist() == [0.5, 0.5]
    assert make(dim=2, optimizer=Adam()).initial_state.tolist() == [0.0] * 4
    assert make(dim=2).initial_state.tolist() == []
    assert make(dim=2, optimizer=Adam()).initial_state.dtype == np.float32


@pytest.mark.parametrize(
    ("initializer", "optimizer", "expected"),
    [
        (Constant(0.0), Adam(), False),
        (Constant(1e-60), None, False),  # zero in float32
        (Constant(-0.0), None, True),  # a hole reads +0.0
        (Constant(1.0), None, True),
        (Uniform(-1, 1), None, True),
        (Normal(), SGD(), True),
        (Constant(0.0), Adagrad(initial_accumulator_value=0.5), True),
        (Constant(0.0), Adagrad(initial_accumulator_value=0.0), False),
    ],
    ids=str,
)
def test_a_presence_bitmap_is_kept_unless_a_fresh_record_is_all_zero_bytes(initializer, optimizer, expected):
    table = make(initializer=initializer, optimizer=optimizer)
    assert table.has_presence is expected
    assert bool(table.num_presence_chunks) is expected


# ---- shards -----------------------------------------------------------------------------------------------------

dims = st.integers(1, 300) | st.sampled_from([1024, 4095, 4096, 4097, 65_535, 65_536])
row_counts = st.integers(1, 10**6) | st.integers(1, 2**48)


@given(row_counts, dims, st.sampled_from(OPTIMIZERS), st.none() | st.integers(1, 10**7))
def test_a_shard_is_a_whole_number_of_bitmap_words_and_of_pages(num_embeddings, dim, optimizer, wanted):
    table = make(num_embeddings, dim, optimizer, rows_per_shard=wanted)
    assert table.rows_per_shard % 64 == 0
    assert table.shard_bytes % 4096 == 0
    assert table.shard_bytes == table.rows_per_shard * table.width * 4
    assert (table.num_shards - 1) * table.rows_per_shard < num_embeddings
    assert num_embeddings <= table.num_shards * table.rows_per_shard


@given(dims, st.sampled_from(OPTIMIZERS), st.integers(1, 10**6))
def test_a_given_number_of_rows_is_rounded_up_by_less_than_one_multiple(dim, optimizer, wanted):
    table = make(10**7, dim, optimizer, rows_per_shard=wanted)
    assert wanted <= table.rows_per_shard < wanted + shard_rows_multiple(table.record_bytes)


@given(st.integers(1, 2**18).map(lambda width: 4 * width))
def test_the_multiple_is_the_smallest_that_is_valid(record_bytes):
    multiple = shard_rows_multiple(record_bytes)
    fits = [rows for rows in range(64, multiple + 1, 64) if rows * record_bytes % 4096 == 0]
    assert fits == [multiple]


@pytest.mark.parametrize(
    ("num_embeddings", "record_bytes", "max_shards", "expected"),
    [
        (10, 256, 30_000, 64),  # a small table has one small shard
        (400_000, 512, 30_000, 64 * MiB // 512),
        (10**8, 512, 30_000, 64 * MiB // 512),  # 48 GB: still the smallest
        (2**31, 128, 30_000, 256 * MiB // 128),  # 256 GB: 1024 shards
        (2**40, 512, 2**30, 512 * MiB // 512),  # 512 TB: the largest
        (10**8, 264, 30_000, 33 * 2 * MiB // 264),  # whole huge pages
        (250_000, 264, 30_000, 250_000),  # but no larger than the table
        (10**8, 2 * MiB + 4, 2**30, 256),  # nor than the largest
        (2**40, 512, 1000, 2**40 // 1000 + 1),  # as large as the remaining mappings require
    ],
)
def test_automatic_sizes(num_embeddings, record_bytes, max_shards, expected):
    rows = choose_rows_per_shard(num_embeddings, record_bytes, None, max_shards)
    assert rows == sizes.round_up(expected, shard_rows_multiple(record_bytes))


@given(row_counts, st.integers(1, 2**18).map(lambda width: 4 * width), st.integers(-5, 40_000))
def test_an_automatic_size_respects_the_remaining_mappings(num_embeddings, record_bytes, max_shards):
    rows = choose_rows_per_shard(num_embeddings, record_bytes, None, max_shards)
    assert -(-num_embeddings // rows) <= max(max_shards, 1)
    assert rows < num_embeddings + shard_rows_multiple(record_bytes)


@given(row_counts, st.integers(1, 2**18).map(lambda width: 4 * width))
def test_automatic_shards_take_64_to_512_mib_if_mappings_allow_it(num_embeddings, record_bytes):
    rows = choose_rows_per_shard(num_embeddings, record_bytes, None, 2**60)
    slack = shard_rows_multiple(record_bytes) * record_bytes
    assert rows * record_bytes <= 512 * MiB + slack
    if rows < num_embeddings:
        assert rows * record_bytes >= 64 * MiB


@given(row_counts, st.integers(1, 2**12))
def test_automatic_shards_are_whole_huge_pages_if_that_does_not_make_them_too_large(
    num_embeddings, record_bytes
):
    rows = choose_rows_per_shard(num_embeddings, record_bytes, None, 2**60)
    assert rows % shard_rows_multiple(record_bytes) == 0
    whole = math.lcm(64, 2 * MiB // math.gcd(2 * MiB, record_bytes))
    if rows < num_embeddings and (-(-64 * MiB // record_bytes) + whole) * record_bytes <= 256 * MiB:
        fits = rows * record_bytes % (2 * MiB) == 0
        assert fits or sizes.round_up(rows, whole) > num_embeddings or rows * record_bytes > 256 * MiB


@given(row_counts, dims)
def test_the_presence_bitmap_has_a_bit_per_row_in_chunks_of_whole_pages(num_embeddings, dim):
    table = make(num_embeddings, dim, initializer=Constant(1.0))
    assert table.presence_bytes == math.ceil(num_embeddings / 8)
    assert table.presence_chunk_bytes % PAGE == 0
    assert table.presence_chunk_bytes <= 4 * MiB
    assert table.presence_bytes <= table.num_presence_chunks * table.presence_chunk_bytes
    assert (table.num_presence_chunks - 1) * table.presence_chunk_bytes < table.presence_bytes


# ---- json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("initializer", [Constant(0.25), Uniform(-1, 1, seed=5), Normal(std=0.5)], ids=str)
def test_a_spec_survives_a_round_trip_through_json(optimizer, initializer):
    table = make(optimizer=optimizer, initializer=initializer)
    assert TableSpec.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_json_is_pinned():
    document = make(optimizer=RowWiseAdagrad(), initializer=Uniform(-1, 1, seed=5)).to_json()
    rest = {name: value for name, value in document.items() if name != "crc32"}
    assert document["crc32"] == zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    assert rest == {
        "format_version": 1,
        "uuid": UUID,
        "stream": "tokens",
        "num_embeddings": 1000,
        "embedding_dim": 6,
        "rows_per_shard": 1024,
        "columns": {"weight": [0, 6], "sum": [6, 7]},
        "optimizer": {"name": "RowWiseAdagrad", "lr": 0.01, "eps": 1e-08},
        "initializer": {"name": "Uniform", "low": -1.0, "high": 1.0, "seed": 5},
    }


def test_the_first_stores_had_no_checksum():
    document = make().to_json()
    del document["crc32"]
    assert TableSpec.from_json(document) == make()


@given(
    st.sampled_from(["stream", "low", "high", "seed", "lr"]),
    st.one_of(st.integers(1, 100), st.floats(0.001, 50.0), st.text()),
)
def test_a_plausible_value_that_was_not_written_is_a_format_error(name, value):
    written = make(optimizer=SGD(lr=0.5), initializer=Uniform(-1, 60, seed=0))
    document = written.to_json()
    for part in (document, document["optimizer"], document["initializer"]):
        if name in part:
            part[name] = value
    if document != written.to_json():
        with pytest.raises(FormatError):
            TableSpec.from_json(document)


@pytest.mark.parametrize("name", [name for name in make().to_json() if name != "crc32"])
def test_a_missing_field_is_a_format_error(name):
    document = make().to_json()
    del document[name]
    with pytest.raises(FormatError, match=name):
        TableSpec.from_json(document)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format_version", 0),
        ("format_version", "1"),
        ("format_version", True),
        ("uuid", "../../x"),
        ("uuid", ""),
        ("uuid", UUID + "\n"),
        ("stream", None),
        ("stream", 5),
        ("num_embeddings", 0),
        ("num_embeddings", -1),
        ("num_embeddings", 2**48 + 1),
        ("num_embeddings", 1000.0),
        ("num_embeddings", True),
        ("embedding_dim", 0),
        ("embedding_dim", 2**16 + 1),
        ("embedding_dim", 7),  # not what the columns say
        ("rows_per_shard", 0),
        ("rows_per_shard", 2**48 + 64),
        ("rows_per_shard", 1000),  # not whole pages
        ("columns", {"weight": [0, 7]}),
        ("columns", {}),
        ("columns", [["weight", [0, 6]]]),
        (
            "optimizer",
            {"name": "Adam", "lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8},
        ),  # its columns are missing
        ("optimizer", "Adam"),
        ("optimizer", False),
        ("initializer", None),
        ("initializer", {"name": "Zeros"}),
    ],
)
def test_an_impossible_value_is_a_format_error(name, value):
    with pytest.raises(FormatError):
        TableSpec.from_json({**make().to_json(), name: value})


def test_a_newer_version_asks_for_an_upgrade():
    with pytest.raises(FormatError, match=r"format version 4 is newer than 3.*upgrade shardemb"):
        TableSpec.from_json({**make().to_json(), "format_version": 4})


def test_a_newer_version_may_have_other_fields():
    with pytest.raises(FormatError, match="upgrade"):
        TableSpec.from_json({"format_version": 7})


@settings(max_examples=500)
@given(damaged(make(optimizer=Adam(), initializer=Uniform(-1, 1)).to_json()))
def test_a_damaged_spec_is_a_format_error_or_a_spec(document):
    document = json.loads(json.dumps(document))
    try:
        table = TableSpec.from_json(document)
    except FormatError:
        return
    # What was accepted is consistent, and survives a round trip.
    assert TableSpec.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert table.shard_bytes % PAGE == 0


# ---- names and fields -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "a", "tokens", "v1.2-x", "_", "0", "C", "a" * 64, "zarr.json2", "c.0.0", "rows",
        "é", "Wörter", "слова", "λέξεις", "词汇", "単語", "단어", "كلمات", "מילים", "शब्द", "คำ", "சொல்", "٣", "字" * 64,
        "𐌰" * 48,
    ],
)  # fmt: skip
def test_names_that_a_table_can_have(name):
    assert spec.check_name(name) == name
    assert spec.check_stored_name(name) == name
    for kind in spec.INTERNAL:
        assert spec.check_stored_name(f"{name}@{kind}") == f"{name}@{kind}"
        with pytest.raises(ValueError, match="cannot be a table's name"):
            spec.check_name(f"{name}@{kind}")


@pytest.mark.parametrize("name", ["Wörter", "단어", "é", "ở", "क़"])
def test_a_name_that_can_be_written_in_several_ways_has_one_form(name):
    apart, together = (unicodedata.normalize(form, name) for form in ("NFD", "NFC"))
    assert spec.check_name(apart) == spec.check_name(together) == spec.normalized(apart) == together


def test_what_is_no_name_at_all_is_not_changed():
    for other in (None, 5, b"a", ("a",)):
        assert spec.normalized(other) is other


@given(st.text(max_size=70))
def test_a_name_that_can_be_stored_can_be_read_and_is_one_folder(name):
    with contextlib.suppress(ValueError):
        found = spec.check_name(name)
        assert spec.check_stored_name(found) == found
        assert spec.check_name(found) == found
        assert Path("a", found).name == found
        assert 0 < len(os.fsencode(found)) <= 192


@given(st.text(max_size=70))
def test_a_stored_name_is_never_more_than_one_folder(name):
    with contextlib.suppress(FormatError):
        found = spec.check_stored_name(name)
        assert Path("a", found).name == found
        assert found not in (".", "..")
        assert 0 < len(os.fsencode(found)) <= 192 + len("@sketch")


@pytest.mark.parametrize("name", ["a/b", ".a", "a\0", "a b", "a@", "a@b", "a@keys@keys", "\ud800", 5, None])
def test_a_stored_name_that_is_no_folder_is_refused(name):
    with pytest.raises(FormatError, match="cannot be a table's name"):
        spec.check_stored_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".shardemb",
        "-a",
        "a/b",
        "/a",
        "a/",
        "../a",
        "a\\b",
        "a b",
        "a\n",
        "a" * 65,
        "é" * 65,
        "𐌰" * 49,
        "\u0301a",
        "a\u200b",
        "a\u2028",
        "a\u202eb",
        "\u00a0",
        "a\u3000b",
        "🙂",
        "a\uff0fb",
        "a\uff20b",
        "…",
        "\ud800",
        "zarr.json",
        "a\0",
    ],
)
def test_names_that_a_table_cannot_have(name):
    with pytest.raises(ValueError, match="cannot be a table's name"):
        spec.check_name(name)


@pytest.mark.parametrize("name", [None, 5, b"tokens", ["tokens"]])
def test_a_name_is_a_str(name):
    with pytest.raises(TypeError, match="name must be a str"):
        spec.check_name(name)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"5", b"null", b'"a"', b"\xff\xfe", b"{} x", b"[" * 100_000, b'{"a":' * 100_000],
)
def test_anything_but_a_json_object_is_a_format_error(data):
    with pytest.raises(FormatError, match="it is not"):
        documents.parse_json(data)


@given(damaged_bytes(json.dumps(make().to_json()).encode()))
def test_damaged_json_is_a_format_error_or_an_object(data):
    with contextlib.suppress(FormatError):
        assert isinstance(documents.parse_json(data), dict)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_int_field_accepts_only_integers_in_its_range(value):
    if type(value) is int and 1 <= value <= 100:
        assert documents.int_field({"n": value}, "n", 100) == value
        return
    with pytest.raises(FormatError, match="n is"):
        documents.int_field({"n": value}, "n", 100)


def test_int_field_needs_its_field():
    with pytest.raises(FormatError, match="n is None"):
        documents.int_field({}, "n", 100)


def test_a_field_may_be_null_where_that_is_a_type_but_not_missing():
    assert documents.field({"a": None}, "a", (dict, type(None))) is None
    with pytest.raises(FormatError, match="a is None"):
        documents.field({}, "a", (dict, type(None)))


def test_a_spec_never_changes():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().num_embeddings = 5


# ---- parts of a table -------------------------------------------------------------------------------------------

NUMBERED = dataclasses.replace(make(optimizer=Adam(), initializer=Uniform(-1, 1, seed=5)), first=3, stride=16)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("first", "stride"), [(3, 16), (0, 16), (0, 2**20), (7, 1)])
def test_a_part_of_a_table_has_version_3_and_says_which_rows_it_has(coded, first, stride):
    precision = dtypes.Wanted(dtype="bfloat16").checked(trains=True) if coded else spec.FLOAT32
    table = dataclasses.replace(make(optimizer=Adam(), precision=precision), first=first, stride=stride)
    document = json.loads(json.dumps(table.to_json()))
    assert (document["format_version"], document["first"], document["stride"]) == (3, first, stride)
    assert TableSpec.from_json(document) == table
    np.testing.assert_array_equal(
        table.numbers_of(np.arange(4)), [first, first + stride, first + 2 * stride, first + 3 * stride]
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("first", each) for each in (-1, 2**48, "0", None, 0.5, True)]
    + [("stride", each) for each in (0, -1, 2**48, "1", None, 1.5, True)],
)
def test_impossible_numbers_of_rows_are_format_errors(name, value):
    document = NUMBERED.to_json() | {name: value}
    document["crc32"] = documents.crc32(document)
    with pytest.raises(FormatError):
        TableSpec.from_json(document)
    del document[name]
    with pytest.raises(FormatError, match=name):
        TableSpec.from_json(document)


def test_a_program_that_knows_no_parts_refuses_them(monkeypatch):
    document = NUMBERED.to_json()
    monkeypatch.setattr(spec, "NUMBERED_VERSION", 2)
    with pytest.raises(FormatError, match="format version 3 is newer"):
        TableSpec.from_json(document)


def test_a_part_ends_where_tables_end():
    rows = 2**48 // 16
    table = dataclasses.replace(NUMBERED, num_embeddings=rows, first=15)
    assert table.numbers_of(np.array([rows - 1])) == 2**48 - 1
    for changes in ({"first": 16}, {"num_embeddings": rows + 1}, {"stride": 17}):
        with pytest.raises(ValueError, match="end past row"):
            dataclasses.replace(table, **changes)
