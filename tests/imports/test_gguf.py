"""GGUF: tensors as llama.cpp writes them, the tokens as keys, and nothing that a damaged header claims."""

import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import gathered

from shardemb.errors import SourceError
from shardemb.imports import blocks, gguf
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.gguf import open_gguf

VALUES = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
WORDS = [f"word{n} \u00e4" for n in range(40)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of nine rows of 64 values, so that small tensors have several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9 * 64 * 4)


# ---- a writer, from the description of the format ---------------------------------------------------------------


def u32(number):
    return struct.pack("<I", number)


def u64(number):
    return struct.pack("<Q", number)


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return u64(len(data)) + data


def strings(values):
    return u32(9) + u32(8) + u64(len(values)) + b"".join(map(text, values))


SOME_METADATA = {
    "general.name": u32(8) + text("a model"),
    "a.flag": u32(7) + b"\1",
    "a.float": u32(6) + struct.pack("<f", 0.5),
    "a.double": u32(12) + struct.pack("<d", 0.5),
    "some.scores": u32(9) + u32(6) + u64(3) + b"\0" * 12,
    "some.merges": strings(["a b", "c d"]),
}


def q8(values):
    """As llama.cpp quantizes: 32 values share a scale of float16. Returns the bytes, and the numbers they stand for."""
    grouped = values.reshape(len(values), -1, 32)
    scales = (np.abs(grouped).max(axis=2) / 127).astype(np.float16)
    numbers = np.round(grouped / scales.astype("f4")[:, :, None]).astype(np.int8)
    data = np.concatenate([scales[:, :, None].view(np.int8), numbers], axis=2).tobytes()
    return data, (numbers * scales.astype("f4")[:, :, None]).reshape(values.shape)


def model(tensors, metadata=(), version=3, alignment=32):
    """A file of tensors: name, shape, number of the type, bytes."""
    values = dict(SOME_METADATA | dict(metadata))
    if alignment != 32:
        values["general.alignment"] = u32(4) + u32(alignment)
    head = b"GGUF" + u32(version) + u64(len(tensors)) + u64(len(values))
    head += b"".join(text(name) + value for name, value in values.items())
    data = b""
    for name, shape, kind, part in tensors:
        data += b"\0" * (-len(data) % alignment)
        head += (
            text(name) + u32(len(shape)) + b"".join(map(u64, reversed(shape))) + u32(kind) + u64(len(data))
        )
        data += part
    return head + b"\0" * (-len(head) % alignment) + data


def written(tmp_path, data):
    (tmp_path / "m.gguf").write_bytes(data)
    return tmp_path / "m.gguf"


def rows_of(path, **options):
    with open_gguf(path, ReadOptions(**options)) as source:
        return gathered(source)


def refusal(path, **options):
    with pytest.raises(SourceError) as error:
        rows_of(path, **options)
    assert "m.gguf" in str(error.value)
    return str(error.value)


F32 = ("w", (40, 64), 0, VALUES.tobytes())
TOKENS = {"tokenizer.ggml.tokens": strings(WORDS)}


# ---- what is read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [32, 4096])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("number", "kind", "name"), [(0, "f4", "float32"), (1, "f2", "float16"),
                                                      (30, ml_dtypes.bfloat16, "bfloat16")])  # fmt: skip
def test_plain_numbers_are_read(tmp_path, number, kind, name, version, alignment):
    array = VALUES.astype(kind)
    tensors = [("norm", (64,), 0, VALUES[0].tobytes()), ("w", (40, 64), number, array.tobytes())]
    with open_gguf(written(tmp_path, model(tensors, (), version, alignment)), ReadOptions()) as source:
        assert (source.format, source.dtype, source.key_type) == ("gguf", name, None)
        assert np.array_equal(gathered(source), array.astype("f4"))
        assert np.array_equal(source.read(5, 17), array.astype("f4")[5:17])


def test_blocks_with_a_scale_are_read(tmp_path):
    data, expected = q8(VALUES)
    with open_gguf(written(tmp_path, model([("w", (40, 64), 8, data)])), ReadOptions()) as source:
        assert source.dtype == "float32"
        assert np.array_equal(gathered(source), expected)
        assert np.array_equal(source.read(5, 17), expected[5:17])


def test_the_table_of_tokens_is_the_default(tmp_path):
    path = written(tmp_path, model([F32, ("token_embd.weight", (2, 64), 0, VALUES[:2].tobytes())]))
    assert np.array_equal(rows_of(path), VALUES[:2])
    assert np.array_equal(rows_of(path, member="w"), VALUES)
    path = written(tmp_path, model([F32, ("v", *F32[1:])]))
    assert "w (40, 64), v (40, 64)" in refusal(path)
    assert "has no 'x'" in refusal(path, member="x")


def test_tokens_are_keys_where_there_is_one_for_each_row(tmp_path):
    path = written(tmp_path, model([F32, ("v", (2, 64), 0, VALUES[:2].tobytes())], TOKENS))
    with open_gguf(path, ReadOptions(member="w", limit=13)) as source:
        assert source.key_type == "string"
        assert [key for block in source.blocks() for key in block.keys.to_pylist()] == WORDS[:13]
    with open_gguf(path, ReadOptions(member="v")) as source:
        assert source.key_type is None


def test_tokens_that_are_no_text(tmp_path):
    words = [b"a", b"b\xff", *WORDS[2:]]
    path = written(tmp_path, model([F32], {"tokenizer.ggml.tokens": strings(words)}))
    assert "row 1" in refusal(path)
    with open_gguf(path, ReadOptions(unicode_errors="replace")) as source:
        assert next(source.blocks()).keys.to_pylist()[:2] == ["a", "b\ufffd"]


@pytest.mark.filterwarnings("ignore")
def test_what_the_package_gguf_writes_is_read(tmp_path):
    foreign = pytest.importorskip("gguf")
    writer = foreign.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(WORDS)
    quantized = foreign.quants.quantize(VALUES, foreign.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", VALUES)
    writer.add_tensor("half", VALUES.astype(np.float16))
    writer.add_tensor("q8", quantized, raw_dtype=foreign.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "m.gguf", ReadOptions()) as source:
        assert source.key_type == "string"
        assert np.array_equal(gathered(source), VALUES)
    assert np.array_equal(rows_of(tmp_path / "m.gguf", member="half"), VALUES.astype("f2").astype("f4"))
    expected = foreign.quants.dequantize(quantized, foreign.GGMLQuantizationType.Q8_0)
    assert np.array_equal(rows_of(tmp_path / "m.gguf", member="q8"), expected)


# ---- what is refused --------------------------------------------------------------------------------------------


HEAD = b"GGUF" + u32(3)

REFUSED = {
    "nothing": (b"", "cut off"),
    "another file": (b"word 1 2 3", "no GGUF"),
    "the first version": (b"GGUF" + u32(1) + b"\0" * 16, "version 1"),
    "big-endian": (b"GGUF\0\0\0\3" + b"\0" * 16, "big-endian"),
    "a quantized type": (model([("w", (1, 256), 12, b"\0" * 144)]), "Q4_K.*llama-quantize"),
    "an unknown type": (model([("w", (1, 256), 99, b"\0" * 144)]), "type 99"),
    "a row of broken blocks": (model([("w", (1, 33), 8, b"\0" * 68)]), "no multiple of 32"),
    "a short file": (model([F32])[:-1], "cut off"),
    "more promised": (model([("w", (2**40, 2**15), 0, b"\0" * 64)]), "ends at byte"),
    "one dimension": (model([("w", (64,), 0, VALUES[0].tobytes())]), "no arrays have two dimensions"),
    "five dimensions": (model([("w", (1, 1, 1, 1, 1), 0, b"\0" * 4)]), "5 dimensions"),
    "a tensor twice": (model([F32, F32]), "'w' is there twice"),
    "a value twice": (HEAD + u64(0) + u64(2) + 2 * (text("k") + u32(7) + b"\0"), "'k' is there twice"),
    "a strange alignment": (model([F32], {"general.alignment": u32(4) + u32(48)}), "power of two"),
    "no alignment": (model([F32], {"general.alignment": u32(4) + u32(0)}), "power of two"),
    "an offset between": (
        HEAD + u64(1) + u64(0) + text("w") + u32(2) + u64(1) * 2 + u32(0) + u64(8) + b"\0" * 99,
        "no multiple of 32",
    ),
    "an unknown value": (HEAD + u64(0) + u64(1) + text("k") + u32(13), "unknown type 13"),
    "arrays of arrays": (HEAD + u64(0) + u64(1) + text("k") + u32(9) + u32(9) + u64(0), "array of arrays"),
    "tokens that are numbers": (
        model([F32], {"tokenizer.ggml.tokens": u32(9) + u32(4) + u64(0)}),
        "no strings",
    ),
    "a long name": (HEAD + u64(0) + u64(1) + u64(2**40), "name of 1099511627776 bytes"),
    "any number of tensors": (HEAD + u64(2**60) + u64(0), "follow"),
    "any number of values": (HEAD + u64(0) + u64(2**60), "follow"),
    "any number of tokens": (
        HEAD + u64(0) + u64(1) + text("tokenizer.ggml.tokens") + u32(9) + u32(8) + u64(2**60),
        "follow",
    ),
    "an array of any length": (HEAD + u64(0) + u64(1) + text("k") + u32(9) + u32(4) + u64(2**62), "follow"),
    "a string of any length": (HEAD + u64(0) + u64(1) + text("k") + u32(8) + u64(2**63), "follow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_damaged_is_refused(tmp_path, case):
    data, message = REFUSED[case]
    with pytest.raises(SourceError, match=message):
        rows_of(written(tmp_path, data))


def test_a_long_header_is_not_walked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER", 1000)
    path = written(tmp_path, model([F32], {"many": strings([""] * 1000)}))
    assert "more is not read of a header" in refusal(path)


def test_a_scale_that_is_no_number_gives_none(tmp_path):
    data = np.float16(np.inf).tobytes() + bytes(range(32))
    rows = rows_of(written(tmp_path, model([("w", (1, 32), 8, data)])))
    assert np.isnan(rows[0, 0])
    assert np.isinf(rows[0, 1:]).all()


def test_options_without_a_meaning_are_refused(tmp_path):
    assert "columns" in refusal(written(tmp_path, model([F32])), columns=("x",))


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_give_rows_or_a_source_error(tmp_path_factory, data):
    whole = bytearray(
        model([("w", (2, 32), 8, b"\0" * 68), ("v", (3,), 0, b"\0" * 12)], {"tokens": strings("ab")})
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) - 3, 40]))])
    try:
        assert rows_of(path).nbytes <= 4 * len(whole)
    except SourceError:
        pass
