"""Every form in which keys can be given, what is refused, and that keys come back as they were."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from shardemb.vocabulary import keys

TEXTS = ["to", "", "be", "a\0", "\0", "snow ☃", "𝄞" * 3, "or"]
BINARIES = [text.encode() for text in TEXTS[:-1]] + [b"\xff\xfe"]
OTHER = {str: BINARIES, bytes: TEXTS}
WIDE = {str: pa.large_string(), bytes: pa.large_binary()}


def checked(given, key_type):
    return keys.checked(given, key_type, "words")


def restored(given, key_type):
    return keys.restored(checked(given, key_type), key_type)


def fits_kernels(array, dtype):
    flags = array.flags
    return array.dtype == dtype and flags.c_contiguous and flags.aligned and flags.writeable


def assert_same(found, expected, shape):
    assert found.shape == shape
    assert found.reshape(-1).tolist() == list(expected)
    assert {type(each) for each in found.reshape(-1).tolist()} <= {int, str, bytes}


# ---- integers ---------------------------------------------------------------------------------------------------


@given(
    npst.arrays(
        npst.integer_dtypes() | npst.unsigned_integer_dtypes(), npst.array_shapes(min_dims=0, min_side=0)
    )
)
def test_integers_of_any_dtype_and_shape_that_fit(array):
    values = array.reshape(-1).tolist()
    if max(values, default=0) >= 2**63:
        with pytest.raises(ValueError, match=rf"int64 keys, and {max(values)} is larger.*view\('int64'\)"):
            checked(array, "int64")
    else:
        assert_same(restored(array, "int64"), values, array.shape)
        assert fits_kernels(checked(array, "int64").integers, np.int64)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (5, ()),
        (np.uint8(5), ()),
        ([5, -7], (2,)),
        (((5,), (6,)), (2, 1)),
        (range(3), (3,)),
        ([2**63 - 1, -(2**63)], (2,)),
        (np.arange(24).reshape(4, 6).T[::2, 1:], (3, 3)),
    ],
    ids=str,
)
def test_integers_of_python_and_numpy(given, shape):
    assert_same(restored(given, "int64"), np.asarray(given).reshape(-1).tolist(), shape)


def test_hashes_of_64_bits_can_be_given_as_the_message_says():
    hashes = np.array([2**64 - 1, 5], np.uint64)
    assert restored(hashes.view("int64"), "int64").view(np.uint64).tolist() == hashes.tolist()


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint32(), pa.int64(), pa.uint64()], ids=str)
def test_integers_of_arrow(kind):
    array = pa.array([9, 1, 2, 3], kind)
    for each in (
        array[1:],
        pa.chunked_array([array[1:3], array[:0], array[3:]]),
        array[1:].dictionary_encode(),
        pa.chunked_array([array[1:].dictionary_encode()]),
    ):
        assert_same(restored(each, "int64"), [1, 2, 3], (3,))


@pytest.mark.parametrize(
    "given",
    [
        True,
        [True, False],
        1.0,
        [1, 2.5],
        np.array([]),  # an empty list is accepted, but this is explicitly of floats
        "1",
        ["1"],
        [b"1"],
        None,
        [None],
        np.array([1, 2], object),
        [2**64],
        [-1, 2**63],
        np.array([1], "M8[s]"),
        {1, 2},
        pa.array([1.0]),
        pa.array([True]),
        pa.array(["1"]),
        pa.array([1], pa.timestamp("s")),
        pa.scalar(1),
    ],
    ids=lambda each: f"{type(each).__name__}-{each}"[:30],
)
def test_anything_but_integers_is_refused(given):
    with pytest.raises(TypeError, match="vocabulary 'words' has integer keys, got dtype"):
        checked(given, "int64")


# ---- strings ----------------------------------------------------------------------------------------------------


def in_every_form(values, kind):
    """Return the same strings in all forms of a flat batch, by name."""
    wide = pa.array(values, WIDE[kind])
    narrow, view = (pa.string(), pa.string_view()) if kind is str else (pa.binary(), pa.binary_view())
    around = pa.array([values[0] * 2, *values, values[0]], narrow)
    return {
        "list": list(values),
        "tuple": tuple(values),
        "objects": np.array(values, object),
        "NumPy scalars": [np.str_(each) if kind is str else np.bytes_(each) for each in values],
        "Arrow": pa.array(values, narrow),
        "large": wide,
        "view": wide.cast(view),
        "sliced": around[1:-1],
        "dictionary": around.dictionary_encode()[1:-1],
        "chunked": pa.chunked_array([around[1:3], around[:0], around[3:-1]]),
        "chunked dictionary": pa.chunked_array([around[1:3], around[3:-1]]).dictionary_encode(),
        "a single chunk": pa.chunked_array([wide]),
    }


@pytest.mark.parametrize(("key_type", "values"), [("string", TEXTS), ("bytes", BINARIES)])
def test_strings_in_every_form(key_type, values):
    forms = in_every_form(values, type(values[0]))
    expected = checked(list(values), key_type)
    for name, form in forms.items():
        found = checked(form, key_type)
        assert found.offsets.tolist() == expected.offsets.tolist(), name
        assert (
            found.data.tobytes()
            == expected.data.tobytes()
            == b"".join(each if isinstance(each, bytes) else each.encode() for each in values)
        ), name
        assert fits_kernels(found.offsets, np.int64), name
        assert fits_kernels(found.data, np.uint8), name
        assert_same(keys.restored(found, key_type), values, (len(values),))


def test_strings_of_numpy_keep_zeros_except_at_their_end():
    for array in (np.array(["to", "a\0b"]), np.array(["to", "a\0b"], np.dtypes.StringDType())):
        assert_same(restored(array, "string"), ["to", "a\0b"], (2,))
    assert_same(restored(np.array([b"to", b"a\0b"]), "bytes"), [b"to", b"a\0b"], (2,))


def test_binaries_of_a_fixed_size_of_arrow():
    assert_same(restored(pa.array([b"ab", b"c\0"], pa.binary(2)), "bytes"), [b"ab", b"c\0"], (2,))


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ("to\0", ()),
        (np.str_("to\0"), ()),
        (np.array("to"), ()),
        (["to", "be"], (2,)),
        ([["to"], ["be"]], (2, 1)),
        ((("to", "be"),), (1, 2)),
        ([[["to"], ["be"]], [["or"], ["not"]]], (2, 2, 1)),
        ([np.array(["to", "be"]), ["or", "not"]], (2, 2)),
        (np.array([["to", "be"], ["or", "not"]]).T, (2, 2)),
        (np.array([["to"], ["be"]], object), (2, 1)),
    ],
    ids=str,
)
def test_strings_of_any_shape_in_c_order(given, shape):
    assert_same(restored(given, "string"), np.array(given, object).reshape(-1).tolist(), shape)


@pytest.mark.parametrize("key_type", ["int64", "string", "bytes"])
def test_no_keys_in_every_form(key_type):
    kind = {"int64": pa.int64(), "string": pa.string(), "bytes": pa.binary()}[key_type]
    some = pa.array([1, 2] if key_type == "int64" else ["a", "b"] if key_type == "string" else [b"a"], kind)
    dtype = np.dtype({"int64": np.int64, "string": "U1", "bytes": "S1"}[key_type])
    forms = [
        ([], (0,)),
        ((), (0,)),
        ([[], []], (2, 0)),
        (np.empty(0, dtype), (0,)),
        (np.empty((3, 0), dtype), (3, 0)),
        (pa.array([]), (0,)),
        (pa.array([], kind), (0,)),
        (some[2:], (0,)),
        (pa.chunked_array([], kind), (0,)),
        (pa.chunked_array([some[:0]]), (0,)),
        (some[:0].dictionary_encode(), (0,)),
    ]
    for form, shape in forms:
        found = checked(form, key_type)
        assert (found.size, found.shape) == (0, shape), form
        assert keys.restored(found, key_type).shape == shape
        assert len(keys.as_arrow(found, key_type)) == 0
        assert found.take(np.empty(0, np.int64)).size == 0
        out = np.empty(0, np.uint64)
        found.hasher((np.uint64(0), np.uint64(0)), out)(0, 0)


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key_type", "kind"), [("string", str), ("bytes", bytes)])
def test_strings_of_the_other_kind_are_refused_in_every_form(key_type, kind):
    """Also if Arrow would accept one for the other. A single str is not taken for a sequence of its characters."""
    other = OTHER[kind]
    forms = [*in_every_form(other, type(other[0])).values(), other[0], [other[:2]], np.array(other[:3])]
    for form in forms:
        with pytest.raises(TypeError, match=f"vocabulary 'words' has keys of {kind.__name__}: "):
            checked(form, key_type)


def test_the_first_key_of_another_type_is_named():
    with pytest.raises(TypeError, match="keys of str: b'be' is a bytes; got"):
        checked(["to", b"be", 5], "string")


class Frame:
    """As that of pandas: a sequence of the names of its columns."""

    ndim = 2

    def __iter__(self):
        return iter(["to", "be"])

    def __getitem__(self, name):
        return [name]


@pytest.mark.parametrize(
    "given",
    [
        5,
        None,
        1.5,
        [5],
        [True],
        ["to", 5],
        ["to", math.nan],
        ["to", ["be"]],
        [["to"], "be"],
        [np.array("to")],
        np.array([1, 2]),
        np.array([True]),
        {"to", "be"},
        {"to": 1},
        {"to": 1}.keys(),
        (each for each in ["to"]),
        bytearray(b"to"),
        [bytearray(b"to")],
        pa.array([1]),
        pa.array([[b"to"]]),
        pa.nulls(2),
        pa.scalar("to"),
        pa.table({"a": ["to"]}),
        Frame(),
    ],
    ids=lambda each: f"{type(each).__name__}-{sorted(each) if isinstance(each, set) else each}"[:30],
)
@pytest.mark.parametrize("key_type", ["string", "bytes"])
def test_anything_but_strings_is_refused(given, key_type):
    with pytest.raises(TypeError, match="vocabulary 'words' has keys of"):
        checked(given, key_type)


@pytest.mark.parametrize(
    ("given", "key_type"),
    [
        (pa.array([1, None]), "int64"),
        (pa.chunked_array([[1], [None]]), "int64"),
        (pa.array([1, None]).dictionary_encode(), "int64"),
        (pa.nulls(1), "int64"),
        (np.ma.masked_array([1, 2], [False, True]), "int64"),
        (np.ma.masked_array(["a", "b"], [False, True]), "string"),
        (["a", None], "string"),
        ([["a"], [None]], "string"),
        ([None], "string"),
        (np.array([b"a", None], object), "bytes"),
        (pa.array(["a", None]), "string"),
        (pa.array(["a", None]).cast(pa.string_view()), "string"),
        (pa.array(["a", None]).dictionary_encode(), "string"),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["a", None])), "string"),
        (pa.chunked_array([[b"a"], [None]]), "bytes"),
    ],
    ids=lambda each: f"{type(each).__name__}",
)
def test_missing_keys_are_refused(given, key_type):
    with pytest.raises(ValueError, match=r"vocabulary 'words': 1 of \d keys are missing \(null\)"):
        checked(given, key_type)


def test_a_null_outside_a_slice_does_not_count():
    assert_same(restored(pa.array(["a", None, "b"])[2:], "string"), ["b"], (1,))
    assert_same(restored(pa.array([None, 5])[1:], "int64"), [5], (1,))


@pytest.mark.parametrize("given", ["\ud800", ["a", "b\udfff"], np.array(["\udc80"])], ids=ascii)
def test_lone_surrogates_have_no_utf8(given):
    with pytest.raises(ValueError, match="a key cannot be encoded as UTF-8 .*use key_type='bytes'"):
        checked(given, "string")


def test_strings_of_two_gibibytes_are_refused(monkeypatch):
    """Only their bounds are read, so the zeros take no memory."""
    zeros = pa.py_buffer(np.zeros(2**31, np.uint8))
    array = pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, 2**31])), zeros])
    with pytest.raises(ValueError, match="'words': a key has 2147483648 bytes, more than 2147483647"):
        checked(array, "bytes")
    monkeypatch.setattr(keys, "MOST_BYTES", 5)
    assert checked(["12345"] * 3, "string").size == 3  # the limit is for each, not for the sum
    with pytest.raises(ValueError, match="a key has 6 bytes, more than 5"):
        checked(["1", "123456"], "string")


@pytest.mark.parametrize("key_type", ["int64", "string"])
def test_ragged_lists_are_refused(key_type):
    ragged = [["a"], ["b", "c"]] if key_type == "string" else [[1], [2, 3]]
    with pytest.raises(ValueError, match="must have the same length|inhomogeneous"):
        checked(ragged, key_type)


# ---- what comes back --------------------------------------------------------------------------------------------


def batches_of(kind):
    return st.lists(kind, max_size=20).flatmap(
        lambda batch: st.tuples(st.just(batch), st.lists(st.integers(0, max(0, len(batch) - 1)), max_size=30))
    )


ANY = {
    "int64": batches_of(st.integers(-(2**63), 2**63 - 1)),
    "string": batches_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    "bytes": batches_of(st.binary(max_size=20)),
}


@pytest.mark.parametrize("key_type", ANY)
@given(st.data())
def test_all_keys_and_some_of_them_come_back(key_type, data):
    batch, which = data.draw(ANY[key_type])
    found = checked(batch, key_type)
    assert found.size == len(batch)
    assert_same(keys.restored(found, key_type), batch, (len(batch),))
    arrow = keys.as_arrow(found, key_type)
    arrow.validate(full=True)
    assert arrow.to_pylist() == batch
    assert_same(restored(arrow, key_type), batch, (len(batch),))
    which = which if batch else []
    some = found.take(np.array(which, np.int64))
    assert_same(keys.restored(some, key_type), [batch[i] for i in which], (len(which),))
    assert_same(
        keys.restored(some.take(np.arange(some.size)[::-1]), key_type),
        [batch[i] for i in which[::-1]],
        (len(which),),
    )


def test_what_is_given_stays_as_it_was():
    """Integers are not copied unless they must be converted, so nothing may write to them."""
    array = np.arange(5)
    assert np.shares_memory(checked(array, "int64").integers, array)
    array.flags.writeable = False
    assert fits_kernels(checked(array, "int64").integers, np.int64)
    assert fits_kernels(checked(pa.array([1, 2]), "int64").integers, np.int64)
