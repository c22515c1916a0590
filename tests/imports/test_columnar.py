"""Columns: lists of every kind that writers make of vectors, and what is no vector."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather
from pyarrow import parquet as pq
from support.sources import gathered, keys_of

from shardemb.errors import SourceError
from shardemb.imports import blocks, columnar
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.columnar import open_arrow, open_parquet

VALUES = np.random.default_rng(1).standard_normal((50, 7)).astype(np.float32)
WORDS = [f"w{n} \u00e4" for n in range(50)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of nine rows of seven values, so that small tables have several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9 * 7 * 4)


def lists(kind=None, values=VALUES, item="item"):
    """Rows as an array of lists: of fixed size, unless another type is given."""
    kind = pa.list_(pa.field(item, pa.float32()), values.shape[1]) if kind is None else kind
    flat = pa.array(values.reshape(-1)).cast(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1])
    made = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
    return made.from_arrays(offsets.cast(pa.int64() if made is pa.LargeListArray else pa.int32()), flat)


TABLE = pa.table({"word": WORDS, "embedding": lists()})


def read(source, opener=open_arrow, **options):
    """Rows and keys of a source that can be opened again."""
    with opener(source, ReadOptions(**options)) as opened:
        rows = gathered(opened)
    with opener(source, ReadOptions(**options)) as opened:
        return rows, keys_of(opened) if opened.key_type else None


def rows_of(source, opener=open_arrow, **options):
    with opener(source, ReadOptions(**options)) as opened:
        return gathered(opened)


def refusal(source, opener=open_arrow, **options):
    with pytest.raises(SourceError) as error:
        rows_of(source, opener, **options)
    return str(error.value)


# ---- lists ------------------------------------------------------------------------------------------------------


KINDS = [
    make(pa.field(item, number))
    for number in (pa.float16(), pa.float32(), pa.float64())
    for item in ("element", "array")
    for make in (pa.list_, pa.large_list, lambda field: pa.list_(field, 7))
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_lists_of_every_kind_are_read(tmp_path, kind):
    values = VALUES.astype(np.float16).astype(np.float32)
    table = pa.table({"vector": lists(kind, values)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=11)
    for source, opener in ((table, open_arrow), (tmp_path / "a.parquet", open_parquet)):
        with opener(source, ReadOptions()) as opened:
            assert opened.dtype == ("float16" if kind.value_type == pa.float16() else "float32")
            assert (opened.dim, opened.num_rows, opened.key_type) == (7, 50, None)
            assert np.array_equal(gathered(opened), values)


@pytest.mark.parametrize("number", ["int8", "uint8", "int16", "uint16"])
def test_lists_of_short_integers_are_read(number):
    values = np.abs(VALUES * 9).astype(number)
    assert np.array_equal(
        rows_of(pa.table({"vector": lists(pa.list_(pa.from_numpy_dtype(number)), values)})), values
    )


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 7)], ids=str
)
def test_slices_are_read(kind):
    table = pa.table({"word": WORDS, "vector": lists(kind)})
    for start, count in ((3, 40), (49, 1), (10, 0)):
        if count or pa.types.is_fixed_size_list(kind):
            rows, keys = read(table.slice(start, count))
            assert np.array_equal(rows, VALUES[start : start + count])
            assert keys == WORDS[start : start + count]


def test_float32_is_not_copied(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**20)
    (block,) = open_arrow(TABLE, ReadOptions()).blocks()
    values = TABLE["embedding"].chunk(0).flatten().to_numpy()
    assert np.shares_memory(block.rows, values)


def test_tensors_of_fixed_shape_are_lists():
    kind = pa.fixed_shape_tensor(pa.float32(), [7])
    table = pa.table({"t": pa.ExtensionArray.from_storage(kind, lists(pa.list_(pa.float32(), 7)))})
    assert np.array_equal(rows_of(table), VALUES)


def test_small_batches_are_joined_and_large_ones_cut():
    sizes = [1, 0, 2, 1, 30, 3, 13]
    starts = np.cumsum([0, *sizes])
    batches = [TABLE.slice(start, size).combine_chunks() for start, size in zip(starts, sizes, strict=False)]
    with open_arrow(pa.concat_tables(batches), ReadOptions()) as source:
        sizes = [len(block.rows) for block in source.blocks()]
    assert max(sizes) <= 18
    assert min(sizes[:-1]) >= 5
    rows, keys = read(pa.concat_tables(batches))
    assert np.array_equal(rows, VALUES)
    assert keys == WORDS


def test_blocks_with_long_keys_are_short(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2**20)
    monkeypatch.setattr(columnar, "_MOST_ROWS", 4)
    monkeypatch.setattr(columnar, "_KEY_BYTES", 250)
    keys = pa.array(["k" * 100] * 8 + ["k"] * 42)
    with open_arrow(pa.table({"key": keys, "vector": lists()}), ReadOptions()) as source:
        assert [len(block.rows) for block in source.blocks()] == [4, 4, 42]


def test_a_limit_takes_the_first_rows():
    for limit in (0, 1, 9, 49, 50, 1000):
        assert np.array_equal(rows_of(TABLE, limit=limit), VALUES[:limit])


def test_lists_that_are_no_vectors_are_refused_with_their_row():
    some = [[1.0, 2.0]] * 20
    kind = pa.list_(pa.float32())
    for bad, message in (
        ([1.0], "has 1 values, but rows before it have 2"),
        (None, "missing"),
        ([1.0, None], "a value is missing"),
    ):
        array = pa.array([*some, bad, *some], kind)
        for source in (array, pa.concat_arrays([pa.array([bad], kind), array]).slice(1)):
            problem = refusal(pa.table({"vector": source}))
            assert "row 20" in problem
            assert message in problem
    fixed = pa.array([*some, None], pa.list_(pa.float32(), 2))
    assert "row 20" in refusal(pa.table({"vector": fixed}))
    fixed = pa.array([*some, [None, 1.0]], pa.list_(pa.float32(), 2))
    assert "row 20" in refusal(pa.table({"vector": fixed}))
    assert "no rows" in refusal(pa.table({"vector": pa.array([], kind)}))
    assert "0 values" in refusal(pa.table({"vector": pa.array([[], []], kind)}))
    assert "70000 values" in refusal(pa.table({"vector": pa.array([], pa.list_(pa.float32(), 70_000))}))


def test_a_large_float64_is_refused_with_its_row():
    values = VALUES.astype(np.float64)
    values[30, 2] = 1e39
    assert "row 30" in refusal(pa.table({"vector": lists(pa.list_(pa.float64()), values)}))
    assert "row 30" in refusal(
        pa.table({f"x{n}": values[:, n] for n in range(7)}), columns=tuple(f"x{n}" for n in range(7))
    )


# ---- columns ----------------------------------------------------------------------------------------------------


def test_vectors_are_the_only_lists_of_numbers_or_those_of_a_usual_name():
    tokens = pa.array([[1, 2]] * 50, pa.list_(pa.int64()))
    table = TABLE.append_column("tokens", tokens).append_column("score", pa.array(np.ones(50)))
    assert np.array_equal(rows_of(table), VALUES)
    table = table.append_column("other", lists())
    assert np.array_equal(rows_of(table), VALUES)
    problem = refusal(table.rename_columns(["word", "a", "tokens", "score", "b"]))
    assert "2 columns are lists of numbers" in problem
    assert "a (fixed_size_list" in problem
    assert "no columns are lists of numbers" in refusal(table.select(["word", "score", "tokens"]))
    assert "is there twice" in refusal(table.rename_columns(["word", "a", "word", "score", "b"]))


def test_keys_are_found_by_name_and_the_key_wins():
    ids, names = pa.array(np.arange(50)), pa.array(WORDS)
    embedding = lists()
    for columns, expected in (
        ({"id": ids, "key": names}, WORDS),
        ({"key": ids, "text": names}, list(range(50))),
        ({"text": names, "token": names, "id": ids}, WORDS),
        ({"id": ids}, list(range(50))),
        ({"id": pa.array(np.ones(50)), "other": names}, None),
    ):
        assert read(pa.table({"embedding": embedding, **columns}))[1] == expected


def test_keys_of_every_kind_are_read():
    kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for kind in kinds:
        keys = pa.array(WORDS).cast(kind) if kind != pa.string_view() else pa.array(WORDS, kind)
        assert read(pa.table({"key": keys, "vector": lists()}))[1] == WORDS
    for kind in (pa.int8(), pa.uint16(), pa.int64(), pa.uint64()):
        with open_arrow(
            pa.table({"key": pa.array(range(50), kind), "vector": lists()}), ReadOptions()
        ) as source:
            block = next(source.blocks())
            assert block.keys.dtype == np.int64
            assert block.keys.tolist() == list(range(len(block.keys)))


def test_keys_that_are_none_are_refused():
    for keys, message in (
        (pa.array([*WORDS[:30], None, *WORDS[31:]]), "row 30: is missing"),
        (pa.array([*range(49), 2**63], pa.uint64()), "larger than 2**63"),
        (pa.array([*WORDS[:30], None, *WORDS[31:]]).dictionary_encode(), "row 30: is missing"),
    ):
        assert message in refusal(pa.table({"key": keys, "vector": lists()}))
    data = pa.array([b"\xff"] * 50).cast(pa.binary())
    broken = pa.StringArray.from_buffers(50, *data.buffers()[1:])
    assert "is damaged" in refusal(pa.table({"key": broken, "vector": lists()}))


def test_columns_are_chosen_by_name():
    table = TABLE.append_column("other", lists(values=VALUES * 2)).append_column("n", pa.array(np.arange(50)))
    assert read(table, columns=("other",))[1] is None
    assert np.array_equal(rows_of(table, columns=("other",)), VALUES * 2)
    assert read(table, columns=("n", "other"))[1] == list(range(50))
    single = pa.table({"name": WORDS} | {f"x{n}": VALUES[:, n].astype("f8" if n else "f4") for n in range(7)})
    rows, keys = read(single, columns=("name", *(f"x{n}" for n in range(7))))
    assert np.array_equal(rows, VALUES)
    assert keys == WORDS
    assert np.array_equal(rows_of(single, columns=("x2",)), VALUES[:, 2:3])
    for columns, message in {
        ("none",): "is not there; there are",
        ("word",): "is string",
        ("word", "n"): "is int64",
        ("other", "embedding"): "is fixed_size_list",
    }.items():
        assert message in refusal(table, columns=columns)
    table = table.append_column("hole", pa.array([1.0] * 30 + [None] * 20))
    assert "'hole', row 30: is missing" in refusal(table, columns=("hole",))


def test_what_this_package_exports_is_read(tmp_path):
    import shardemb

    with shardemb.open(tmp_path / "s.zarr") as store:
        table = store.create_table("t", num_embeddings=50, embedding_dim=7)
        table.write(np.arange(50), VALUES)
        table.export_parquet(tmp_path / "t.parquet")
        raw = store.create_table("raw", num_embeddings=50, embedding_dim=7, dtype="raw")
        raw.export_parquet(tmp_path / "raw.parquet")
        store.commit()
    rows, keys = read(tmp_path / "t.parquet", open_parquet)
    assert np.array_equal(rows, VALUES)
    assert keys == list(range(50))
    assert "raw rows are exported" in refusal(tmp_path / "raw.parquet", open_parquet)


# ---- parquet ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 7, 20, 1000])
def test_row_groups_of_any_size_are_read(tmp_path, group):
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=group)
    rows, keys = read(tmp_path / "a.parquet", open_parquet)
    assert np.array_equal(rows, VALUES)
    assert keys == WORDS
    assert np.array_equal(rows_of(tmp_path / "a.parquet", open_parquet, limit=23), VALUES[:23])


def test_files_are_read_by_ascending_number(tmp_path):
    folder = tmp_path / "data"
    (folder / "part=0").mkdir(parents=True)
    for n in range(12):
        pq.write_table(TABLE.slice(4 * n, 4), folder / "part=0" / f"f-{n}.parquet")
    (folder / "_temporary.parquet").write_text("")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.parquet").write_text("")
    (folder / "part=0" / "_SUCCESS").write_text("")
    for source in (folder, str(folder / "*" / "f-*.parquet"), f"{folder}/**/*[0-9].parquet"):
        rows, keys = read(source, open_parquet)
        assert np.array_equal(rows, VALUES[:48])
        assert keys == WORDS[:48]
    assert "no parquet file" in refusal(str(folder / "g-*.parquet"), open_parquet)
    (tmp_path / "empty").mkdir()
    assert "no parquet file" in refusal(tmp_path / "empty", open_parquet)
    pq.write_table(TABLE.set_column(0, "word", pa.array(range(50))), folder / "part=0" / "f-12.parquet")
    assert "is int64, but string in the first file" in refusal(folder, open_parquet)
    pq.write_table(TABLE.select(["embedding"]), folder / "part=0" / "f-12.parquet")
    assert "is missing, but string in the first file" in refusal(folder, open_parquet)


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    pq.write_table(TABLE, tmp_path / "a[1].parquet")
    assert np.array_equal(rows_of(tmp_path / "a[1].parquet", open_parquet), VALUES)


def test_damaged_parquet_is_refused(tmp_path):
    pq.write_table(TABLE, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "a.parquet").read_bytes()
    at = data.index(VALUES[:9].tobytes())
    for bad in (b"", b"PAR1", data[:-10], data[: len(data) // 2], data[: at - 30] + b"\xff" * 30 + data[at:]):
        (tmp_path / "b.parquet").write_bytes(bad)
        assert "b.parquet" in refusal(tmp_path / "b.parquet", open_parquet)
    with pytest.raises(FileNotFoundError):
        open_parquet(tmp_path / "none.parquet", ReadOptions())
    assert "member" in refusal(tmp_path / "a.parquet", open_parquet, member="x")


def open_files():
    """The names of files that this process has open."""
    return {Path(each.readlink()).name for each in Path("/proc/self/fd").iterdir() if each.is_symlink()}


@pytest.mark.parametrize("group", [7, 50])
def test_a_source_that_is_left_early_closes_its_files(tmp_path, group):
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=group)
    with open_parquet(tmp_path / "a.parquet", ReadOptions()) as source:
        left = source.blocks()
        next(left)
        assert "a.parquet" in open_files()
    assert "a.parquet" not in open_files()


def test_parquet_of_other_writers_is_read(tmp_path):
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    duckdb.from_arrow(TABLE).write_parquet(str(tmp_path / "d.parquet"))
    frame = polars.from_arrow(TABLE)
    frame.write_parquet(tmp_path / "p.parquet")
    frame.with_columns(polars.col("embedding").arr.to_list()).write_parquet(
        tmp_path / "l.parquet", use_pyarrow=False
    )
    for name in "dpl":
        rows, keys = read(tmp_path / f"{name}.parquet", open_parquet)
        assert np.array_equal(rows, VALUES)
        assert keys == WORDS


# ---- Arrow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream])
def test_files_and_streams_are_read(tmp_path, make, compression):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        make(sink, TABLE.schema, options=options) as writer,
    ):
        writer.write_table(TABLE, max_chunksize=8)
    rows, keys = read(tmp_path / "a.arrow")
    assert np.array_equal(rows, VALUES)
    assert keys == WORDS
    data = (tmp_path / "a.arrow").read_bytes()
    for bad in (b"", data[:20], data[: len(data) // 2]):
        (tmp_path / "b.arrow").write_bytes(bad)
        assert "b.arrow" in refusal(tmp_path / "b.arrow")


def test_feather_is_read(tmp_path):
    feather.write_feather(TABLE, tmp_path / "a.feather")
    assert np.array_equal(rows_of(tmp_path / "a.feather"), VALUES)


def test_offsets_that_lead_out_of_a_file_are_refused(tmp_path):
    table = pa.table({"vector": lists(pa.list_(pa.float32()))})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = (tmp_path / "a.arrow").read_bytes()
    offsets = (np.arange(51, dtype=np.int32) * 7).tobytes()
    assert data.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(
        data.replace(offsets, (np.arange(51, dtype=np.int32) * 7 + 2**24).tobytes())
    )
    assert "is damaged" in refusal(tmp_path / "a.arrow")


def test_names_of_columns_that_are_no_text_are_refused(tmp_path):
    feather.write_feather(TABLE, tmp_path / "a.arrow")
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data.replace(b"word", b"wor\xff"))
    assert "the name of a column is not UTF-8: b'wor" in refusal(tmp_path / "a.arrow")


def test_what_has_the_stream_interface_is_read():
    reader = pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(max_chunksize=8))
    with open_arrow(reader, ReadOptions()) as source:
        assert (source.name, source.num_rows, source.total) == ("pyarrow.RecordBatchReader", None, 0)
        assert np.array_equal(gathered(source), VALUES)
    assert np.array_equal(rows_of(TABLE.to_batches()[0]), VALUES)


def test_frames_of_other_libraries_are_read():
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    frame = polars.from_arrow(TABLE)
    for source in (frame, frame.with_columns(polars.col("embedding").arr.to_list())):
        rows, keys = read(source)
        assert np.array_equal(rows, VALUES)
        assert keys == WORDS
    with open_arrow(frame, ReadOptions()) as source:
        assert source.num_rows == 50
    rows, keys = read(duckdb.from_arrow(TABLE))
    assert np.array_equal(rows, VALUES)
    assert keys == WORDS


def test_data_sets_of_hugging_face_are_read():
    datasets = pytest.importorskip("datasets")
    values = {"text": WORDS, "embeddings": VALUES.tolist()}
    fixed = datasets.Features(
        text=datasets.Value("string"), embeddings=datasets.List(datasets.Value("float32"), length=7)
    )
    for features in (None, fixed):
        source = datasets.Dataset.from_dict(values, features=features)
        rows, keys = read(source)
        assert np.array_equal(rows, VALUES)
        assert keys == WORDS
        rows, keys = read(source.select([3, 30, 2]))
        assert np.array_equal(rows, VALUES[[3, 30, 2]])
        assert keys == [WORDS[3], WORDS[30], WORDS[2]]
        assert np.array_equal(rows_of(source.to_iterable_dataset()), VALUES)


def test_a_source_that_breaks_off_is_refused():
    def batches():
        yield from TABLE.to_batches(max_chunksize=8)[:2]
        raise ValueError("the network is down")

    reader = pa.RecordBatchReader.from_batches(TABLE.schema, batches())
    assert "the network is down" in refusal(reader)
    # What is beyond a limit is not asked for.
    reader = pa.RecordBatchReader.from_batches(TABLE.schema, batches())
    assert np.array_equal(rows_of(reader, limit=16), VALUES[:16])


# ---- any table --------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 25), min_size=1, max_size=6),
    dim=st.integers(1, 9),
    kind=st.sampled_from([pa.list_, pa.large_list]),
    limit=st.none() | st.integers(0, 100),
    start=st.integers(0, 5),
)
def test_batches_of_any_sizes_give_the_rows_of_a_model(sizes, dim, kind, limit, start):
    total = sum(sizes) + start
    values = np.random.default_rng(total).standard_normal((total, dim)).astype(np.float32)
    array = lists(kind(pa.float32()), values).slice(start)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(array.slice(at, size))
        at += size
    table = pa.table({"id": pa.chunked_array([pa.array(range(len(piece)), pa.int32()) for piece in pieces]),
                      "vector": pa.chunked_array(pieces)})  # fmt: skip
    if total == start:
        assert "no rows" in refusal(table)
    else:
        assert np.array_equal(rows_of(table, limit=limit), values[start:][:limit])


def as_stream(table, path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "parquet": (lambda table, path: pq.write_table(table, path, compression="none"), open_parquet),
    "file": (lambda table, path: feather.write_feather(table, path, "uncompressed"), open_arrow),
    "stream": (as_stream, open_arrow),
}


@pytest.mark.parametrize("form", WRITERS)
@settings(max_examples=40)
@given(data=st.data())
def test_any_bytes_give_rows_or_a_source_error(tmp_path_factory, form, data):
    path = tmp_path_factory.getbasetemp() / f"any.{form}"
    write, opener = WRITERS[form]
    write(pa.table({"word": WORDS[:5], "vector": lists(pa.list_(pa.float32()), VALUES[:5])}), path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        rows_of(path, opener)
    except SourceError:
        pass


def test_names_are_sorted_by_their_numbers():
    names = ["a/part-10", "a/part-9", "a/part-09x", "a/part", "b"]
    assert [path.name for path in sorted(map(Path, names), key=columnar.by_numbers)] == [
        "part", "part-09x", "part-9", "part-10", "b",
    ]  # fmt: skip
