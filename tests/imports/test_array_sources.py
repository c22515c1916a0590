"""Arrays of NumPy: every layout that NumPy writes gives its rows, and nothing else gives any."""

import io
import struct
import threading
import zipfile
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import gathered

from shardemb.errors import SourceError
from shardemb.imports import arrays, blocks
from shardemb.imports.arrays import open_npy
from shardemb.imports.blocks import ReadOptions

VALUES = np.random.default_rng(1).standard_normal((50, 7)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of nine rows of seven values, so that small arrays have several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9 * 7 * 4)


def rows_of(path, **options):
    """All rows of a source, put together from its blocks."""
    with open_npy(path, ReadOptions(**options)) as source:
        return gathered(source)


def saved(path, array):
    np.save(path, array)
    return path.with_suffix(".npy")


def refusal(path, **options):
    """The message with which a file is refused, at the latest when it is read."""
    with pytest.raises(SourceError) as error:
        rows_of(path, **options)
    assert str(path.name) in str(error.value)
    return str(error.value)


def raw(descr="<f4", fortran="False", shape="(2, 3)", data=b"\0" * 24, version=1):
    """A .npy file, of parts that need not fit."""
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + data


# ---- what is read -----------------------------------------------------------------------------------------------


TYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "i1", "u1", "<i2", ">i2", "<u2", ml_dtypes.bfloat16]
TYPES += [ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_numbers_of_every_type_and_order_are_read(tmp_path, kind, order):
    array = np.asarray(np.abs(VALUES) * 20, order=order).astype(kind)
    path = saved(tmp_path / "a", array)
    assert np.array_equal(rows_of(path), array.astype(np.float32))


def test_what_holds_the_rows_without_loss_is_named(tmp_path):
    names = {
        "f4": "float32",
        ">f2": "float16",
        "f8": "float32",
        "i1": "float32",
        ml_dtypes.bfloat16: "bfloat16",
    }
    for kind, name in names.items():
        with open_npy(saved(tmp_path / "a", VALUES.astype(kind)), ReadOptions()) as source:
            assert (source.format, source.dtype, source.dim, source.key_type) == ("npy", name, 7, None)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_are_read(tmp_path, version):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, VALUES, version)
    assert np.array_equal(rows_of(tmp_path / "a.npy"), VALUES)


def test_a_limit_takes_the_first_rows(tmp_path):
    path = saved(tmp_path / "a", VALUES)
    for limit in (0, 1, 9, 49, 50, 1000):
        assert np.array_equal(rows_of(path, limit=limit), VALUES[:limit])


def test_a_link_is_followed(tmp_path):
    saved(tmp_path / "a", VALUES)
    (tmp_path / "link.npy").symlink_to(tmp_path / "a.npy")
    assert np.array_equal(rows_of(tmp_path / "link.npy"), VALUES)


def test_rows_are_read_at_any_place_by_several_threads(tmp_path):
    wrong = []

    def check(seed):
        for start in np.random.default_rng(seed).integers(0, 50, 200):
            if not np.array_equal(source.read(start, 50), VALUES[start:]):
                wrong.append(start)

    with open_npy(saved(tmp_path / "a", np.asfortranarray(VALUES)), ReadOptions()) as source:
        threads = [threading.Thread(target=check, args=[seed]) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(ValueError, match="50 rows"):
            source.read(0, 51)
    assert wrong == []


def test_a_closed_source_reads_nothing(tmp_path):
    with open_npy(saved(tmp_path / "a", VALUES), ReadOptions()) as source:
        (part,) = source.parts
    with pytest.raises(OSError, match="descriptor"):
        part.fill(0, np.empty((1, 7), np.float32))


def test_blocks_begin_where_chunks_do():
    part = mock.Mock(num_rows=30)
    for align, starts in {1: [0, 9, 18, 27], 2: [0, 8, 16, 24], 12: [0, 12, 24], 100: [0, 9, 18, 27]}.items():
        source = arrays.ArraySource("npy", "x", 7, "float32", [part], align=align)
        assert [block.first for block in source.blocks()] == starts


# ---- archives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_only_array_of_rows_in_an_archive_is_read(tmp_path, save):
    save(tmp_path / "a.npz", words=np.array(["a", "b"]), vectors=VALUES, norms=VALUES[0])
    assert np.array_equal(rows_of(tmp_path / "a.npz"), VALUES)
    assert np.array_equal(rows_of(tmp_path / "a.npz", limit=11), VALUES[:11])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_of_several_arrays_one_is_chosen(tmp_path, save):
    save(tmp_path / "a.npz", one=VALUES, two=VALUES.astype("f8") * 2)
    assert "one (50, 7), two (50, 7)" in refusal(tmp_path / "a.npz")
    assert "has no 'three'" in refusal(tmp_path / "a.npz", member="three")
    for member in ("two", "two.npy"):
        assert np.array_equal(rows_of(tmp_path / "a.npz", member=member), VALUES * 2)


def test_stored_parts_are_joined_by_number(tmp_path):
    np.savez(tmp_path / "a.npz", **{f"part{n}": VALUES[5 * n : 5 * n + 5] for n in reversed(range(10))})
    assert np.array_equal(rows_of(tmp_path / "a.npz", member="part*"), VALUES)
    np.savez(tmp_path / "b.npz", part0=VALUES, part2=VALUES)
    assert "parts are missing" in refusal(tmp_path / "b.npz", member="part*")
    np.savez_compressed(tmp_path / "c.npz", part0=VALUES, part1=VALUES)
    assert "np.savez" in refusal(tmp_path / "c.npz", member="part*")


def test_a_shape_of_many_digits_is_refused_at_once(tmp_path):
    """And not after all ways to cut them into numbers were tried."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (40, " + b"9" * 10_000
    path = tmp_path / "vectors.npy"
    for end in (b"", b")}", b" 9)}"):
        path.write_bytes(b"\x93NUMPY\1\0" + len(header + end).to_bytes(2, "little") + header + end)
        with pytest.raises(SourceError, match="the header does not say"):
            open_npy(path, ReadOptions())


def test_a_stored_array_is_where_its_own_header_says(tmp_path):
    """Its extra field differs from that in the directory, as zip's other writers have it."""
    data = io.BytesIO()
    np.save(data, VALUES)
    info = zipfile.ZipInfo("a.npy")
    info.extra = b"\xfe\xca\x08\0" + b"local..."
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(info, data.getvalue())
        info.extra = b""
    assert np.array_equal(rows_of(tmp_path / "a.npz"), VALUES)


def test_an_archive_that_expands_to_more_than_its_header_promises_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", raw(data=b"\0" * 10_000_000))
    assert (tmp_path / "a.npz").stat().st_size < 20_000
    assert "24 bytes, but 10000000 follow" in refusal(tmp_path / "a.npz")


def test_compressed_columns_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.asfortranarray(VALUES))
    assert "np.savez, or in C order" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_archives_are_refused(tmp_path, save):
    save(tmp_path / "a.npz", a=VALUES)
    data = (tmp_path / "a.npz").read_bytes()
    for nbytes in range(4, len(data), 61):
        (tmp_path / "b.npz").write_bytes(data[:nbytes])
        assert "b.npz" in refusal(tmp_path / "b.npz")
    # The size in the directory is more than there is.
    at = data.index(b"PK\x01\x02")
    (tmp_path / "b.npz").write_bytes(
        data[: at + 20] + b"\xff\xff\xff\x7f" + b"\xff\xff\xff\x7f" + data[at + 28 :]
    )
    refusal(tmp_path / "b.npz")


# ---- what is refused --------------------------------------------------------------------------------------------


REFUSED = {
    "objects": (raw("|O"), "pickle"),
    "integers": (raw("<i4"), "int32.*astype"),
    "long integers": (raw("<i8"), "int64.*astype"),
    "complex": (raw("<c8"), "complex64"),
    "long double": (raw("<f16"), "float128|longdouble"),
    "booleans": (raw("|b1"), "bool"),
    "text": (raw("<U3"), "not numbers"),
    "dates": (raw("<M8[s]"), "not numbers"),
    "bytes without a type": (raw("|V1"), r"\|V1.*float16"),
    "an unknown type": (raw("<x4"), "unknown type"),
    "a record": (raw([("a", "<f4")]), "a record"),
    "one dimension": (raw(shape="(6,)"), r"\(6,\).*reshape"),
    "three dimensions": (raw(shape="(1, 2, 3)"), r"\(1, 2, 3\).*reshape"),
    "no dimension": (raw(shape="()"), "reshape"),
    "no values": (raw(shape="(2, 0)", data=b""), "0 values"),
    "wide rows": (raw(shape="(1, 70000)"), "70000 values"),
    "more promised": (raw(shape="(1000000000000, 3)"), "1000000000000 rows.*24 follow"),
    "less promised": (raw(shape="(1, 3)"), "12 bytes, but 24 follow"),
    "no shape": (raw(shape="None"), "does not say"),
    "a later version": (raw(version=4), "version 4"),
    "nothing": (b"", "cut off"),
    "a beginning": (b"\x93NUMPY\x01\x00\xff\xff", "cut off"),
    "a long header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "4294967295 bytes"),
    "something else": (b"0 1 2 3 4 5 6 7 8 9", "no .npy file"),
    "compressed": (b"\x1f\x8b\x08\x00 and so on", "decompress it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_array_of_rows_is_refused(tmp_path, case):
    data, message = REFUSED[case]
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        rows_of(tmp_path / "a.npy")


def test_a_pickle_is_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("it was unpickled",)

    np.save(tmp_path / "a.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    assert "pickle" in refusal(tmp_path / "a.npy")


def test_a_large_float64_is_refused_with_its_row(tmp_path):
    array = VALUES.astype(np.float64)
    array[30, 2], array[20, 1] = 1e39, np.inf
    assert "row 30" in refusal(saved(tmp_path / "a", array))
    array[30, 2] = 1e-60
    assert rows_of(saved(tmp_path / "a", array))[[30, 20], [2, 1]].tolist() == [0, np.inf]


def test_options_without_a_meaning_are_refused(tmp_path):
    path = saved(tmp_path / "a", VALUES)
    for options in ({"member": "x"}, {"columns": ("x",)}, {"unicode_errors": "ignore"}):
        assert next(iter(options)) in refusal(path, **options)


def test_folders_pipes_and_missing_files_are_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.npy")
    for name in (".", "pipe.npy"):
        with pytest.raises(SourceError, match="not a file"):
            open_npy(tmp_path / name, ReadOptions())
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        open_npy(tmp_path / "none.npy", ReadOptions())


# ---- choosing ---------------------------------------------------------------------------------------------------


def test_parts_must_fit_together():
    shapes = {"w.0": (2, 3), "w.1": (2, 4), "v.1": (2, 3), "v.01": (2, 3), "b.0": (2,)}
    for member, message in {
        "w.*": "rows have 4 values, but those of w.0 have 3",
        "v.*": "there twice",
        "b.*": "reshape",
        "x.*": "no name fits",
        "*.*": "more than one",
    }.items():
        with pytest.raises(SourceError, match=message.replace("*", r"\*")):
            blocks.chosen("x", shapes, member)


def test_a_name_with_a_star_in_it_is_a_name():
    assert blocks.chosen("x", {"w*": (2, 3), "w1": (2, 3)}, "w*") == ["w*"]


# ---- anything at all --------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, whole):
    """A valid file with a few bytes changed, and maybe cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, min(len(data), 200) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.sampled_from([len(data), draw(st.integers(0, len(data)))]))])


@settings(max_examples=150)
@given(
    data=damaged(raw())
    | damaged(raw("<f8", "True", "(1, 3)"))
    | st.binary(max_size=50).map(b"\x93NUMPY\1".__add__)
)
def test_any_bytes_give_rows_or_a_source_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.npy"
    path.write_bytes(data)
    try:
        rows = rows_of(path)
    except SourceError:
        return
    assert rows.nbytes <= 4 * len(data)


@settings(max_examples=30)
@given(data=st.data())
def test_any_archive_gives_rows_or_a_source_error(tmp_path_factory, data):
    buffer = io.BytesIO()
    data.draw(st.sampled_from([np.savez, np.savez_compressed]))(buffer, a=VALUES[:3], b=VALUES[0])
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "any.npz"
    path.write_bytes(whole)
    try:
        assert rows_of(path).shape[1] <= blocks.MAX_DIM
    except SourceError:
        pass
