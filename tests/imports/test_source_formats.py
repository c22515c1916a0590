"""Formats: what a source is, by its bytes more than by its name, and which reader gets it."""

import bz2
import gzip
import json
import struct

import numpy as np
import pyarrow as pa
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq
from support.sources import gathered, keys_of

from shardemb.errors import SourceError
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.formats import FORMATS, guess, open_source

VALUES = np.random.default_rng(1).standard_normal((20, 5)).astype(np.float32)
WORDS = [f"word{n}" for n in range(20)]
TABLE = pa.table({"word": WORDS, "vector": list(VALUES)})


def as_text(header, blank=" "):
    lines = [f"{len(VALUES)} {VALUES.shape[1]}"] * header
    lines += [blank.join([word, *map(str, row)]) for word, row in zip(WORDS, VALUES.tolist(), strict=True)]
    return "\n".join([*lines, ""]).encode()


def as_binary(newline=b"\n"):
    rows = [word.encode() + b" " + row.tobytes() + newline for word, row in zip(WORDS, VALUES, strict=True)]
    return b"20 5\n" + b"".join(rows)


def as_safetensors():
    header = json.dumps({"w": {"dtype": "F32", "shape": [20, 5], "data_offsets": [0, 400]}}).encode()
    return struct.pack("<Q", len(header)) + header + VALUES.tobytes()


def as_gguf():
    info = struct.pack("<Q1sIQQIQ", 1, b"w", 2, 5, 20, 0, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
    return head + b"\0" * (-len(head) % 32) + VALUES.tobytes()


def write(path, form):
    """Write the same rows in any format; return the name of the format that is to be found."""
    if form == "npy":
        with open(path, "wb") as file:
            np.save(file, VALUES)
    elif form == "npz":
        with open(path, "wb") as file:
            np.savez(file, VALUES)
        return "npy"
    elif form == "parquet":
        pq.write_table(TABLE, path)
    elif form.startswith("arrow"):
        make = pa.ipc.new_stream if form == "arrow stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, make(sink, TABLE.schema) as writer:
            writer.write_table(TABLE)
        return "arrow"
    elif form == "torch":
        torch = pytest.importorskip("torch")
        torch.save({"w": torch.tensor(VALUES)}, path)
    elif form == "hdf5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file["w"] = VALUES
    elif form == "zarr":
        zarr.create_array(path, data=VALUES)
    elif form == "zarr 2":
        zarr.create_group(path, zarr_format=2).create_array("w", data=VALUES)
        return "zarr"
    else:
        data = {
            "word2vec-text": as_text(1),
            "glove": as_text(0),
            "word2vec-binary": as_binary(),
            "safetensors": as_safetensors(),
            "gguf": as_gguf(),
        }
        path.write_bytes(data[form])
    return form


WRITTEN = [
    "npy",
    "npz",
    "parquet",
    "arrow",
    "arrow stream",
    "torch",
    "hdf5",
    "zarr",
    "zarr 2",
    "word2vec-text",
]
WRITTEN += ["glove", "word2vec-binary", "safetensors", "gguf"]
WITH_KEYS = {"parquet", "arrow", "word2vec-text", "glove", "word2vec-binary"}


@pytest.mark.parametrize("form", WRITTEN)
def test_every_format_is_told_by_its_bytes_and_read(tmp_path, form):
    found = write(tmp_path / "vectors", form)
    assert guess(tmp_path / "vectors") == guess(str(tmp_path / "vectors")) == found
    for form in (None, found):
        with open_source(tmp_path / "vectors", form) as source:
            assert (source.format, source.dim) == (found, 5)
            assert source.key_type == ("string" if found in WITH_KEYS else None)
            assert np.array_equal(gathered(source), VALUES)
    if found in WITH_KEYS:
        with open_source(tmp_path / "vectors", None, ReadOptions(limit=7)) as source:
            assert keys_of(source) == WORDS[:7]


def test_all_formats_have_a_reader():
    assert set(FORMATS) == {
        "word2vec-text", "word2vec-binary", "glove", "fasttext-text", "fasttext-binary", "npy", "safetensors", "gguf",
        "parquet", "arrow", "torch", "hdf5", "zarr",
    }  # fmt: skip


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
@pytest.mark.parametrize("form", ["word2vec-text", "glove", "word2vec-binary"])
def test_compressed_words_are_told_and_read(tmp_path, form, compress):
    write(tmp_path / "plain", form)
    (tmp_path / "vectors").write_bytes(compress((tmp_path / "plain").read_bytes()))
    with open_source(tmp_path / "vectors") as source:
        assert source.format == form
        assert np.array_equal(gathered(source), VALUES)


def test_other_formats_are_not_decompressed(tmp_path):
    (tmp_path / "vectors").write_bytes(gzip.compress(as_safetensors()))
    with pytest.raises(SourceError, match=r"safetensors, compressed with gzip; decompress it first"):
        open_source(tmp_path / "vectors")


def test_the_magic_of_fasttext_is_known(tmp_path):
    (tmp_path / "model.bin").write_bytes(struct.pack("<ii", 793712314, 12) + b"\0" * 99)
    assert guess(tmp_path / "model.bin") == "fasttext-binary"


@pytest.mark.parametrize("name", ["wiki.vec", "wiki.vec.gz"])
def test_text_of_fasttext_is_told_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(as_text(1))
    assert guess(tmp_path / name) == "fasttext-text"


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (b"a 1 2 3\nb 4 5 6\n", "glove"),
        (b". . . 1e-5 -2 .5\n", "glove"),
        (b"the 0.5", "glove"),
        (b"a 1 2 3 " + b"4 " * 200_000, "glove"),
        (b"2 3\nto kens 1 2 3\n", "word2vec-text"),
        (b"2 3 \r\na 1 2 3 \r\n", "word2vec-text"),
        (b"2 3\na 1 2 x\n", "word2vec-text"),
        (b"1 70000\na " + b"0.25 " * 70_000, "word2vec-text"),
        (as_binary(b""), "word2vec-binary"),
        (b"1 1\na \0\0\x80\x3f", "word2vec-binary"),
    ],
)
def test_text_and_binary_are_told_apart(tmp_path, data, form):
    (tmp_path / "vectors").write_bytes(data)
    assert guess(tmp_path / "vectors") == form


@pytest.mark.parametrize(
    "data",
    [
        b"2 1\n1 2\n",
        b"5 3\na 1\n",
        b"",
        b"\n",
        b"word\n",
        b"a\t1\t2\n",
        b"a,b\n",
        b"\x89PNG",
        b"{}",
        b"a b c\n",
    ],
)
def test_what_is_ambiguous_or_unknown_is_refused_with_the_names_of_formats(tmp_path, data):
    (tmp_path / "vectors").write_bytes(data)
    with pytest.raises(SourceError) as error:
        open_source(tmp_path / "vectors")
    assert "vectors: its format cannot be told" in str(error.value)
    assert f"pass format=, one of {', '.join(FORMATS)}" in str(error.value)


def test_folders_are_told_by_what_is_in_them(tmp_path):
    with pytest.raises(SourceError, match="the folder has no metadata"):
        guess(tmp_path)
    (tmp_path / "data" / "part=1").mkdir(parents=True)
    pq.write_table(TABLE, tmp_path / "data" / "part=1" / "a.parquet")
    assert guess(tmp_path / "data") == "parquet"
    for pattern in ("part=1/*.parquet", "part=?/a.parquet"):
        assert guess(tmp_path / "data" / pattern) == "parquet"
    (tmp_path / "data" / "model.safetensors").write_bytes(as_safetensors())
    assert guess(tmp_path / "data") == "safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "data/model.safetensors"}}))
    assert guess(index) == "safetensors"


def test_archives_are_told_by_their_members(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("glove.txt", "a 1 2")
    with pytest.raises(SourceError, match=r"but glove\.txt; unpack it"):
        guess(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes((tmp_path / "a.zip").read_bytes()[:20])
    with pytest.raises(SourceError, match="zip archive"):
        guess(tmp_path / "b.zip")


def test_a_pickle_of_gensim_leads_to_its_vectors(tmp_path):
    (tmp_path / "model").write_bytes(b"\x80\x04\x95...")
    with pytest.raises(SourceError, match="pickle of Python.*save the vectors"):
        open_source(tmp_path / "model")
    np.save(tmp_path / "model.wv.vectors.npy", VALUES)
    np.save(tmp_path / "model.syn1neg.npy", VALUES)
    np.save(tmp_path / "mode.vectors.npy", VALUES)
    with pytest.raises(SourceError, match=r"import model\.wv\.vectors\.npy, with tokens="):
        open_source(tmp_path / "model")


def test_what_gensim_saves_is_told(tmp_path):
    gensim = pytest.importorskip("gensim.models.keyedvectors")
    vectors = gensim.KeyedVectors(5)
    vectors.add_vectors(WORDS, VALUES)
    vectors.save(str(tmp_path / "model"), sep_limit=0)
    with pytest.raises(SourceError, match=r"import model\.vectors\.npy, with tokens="):
        open_source(tmp_path / "model")
    with open_source(tmp_path / "model.vectors.npy") as source:
        assert np.array_equal(gathered(source), VALUES)
    for binary in (False, True):
        vectors.save_word2vec_format(str(tmp_path / "words"), binary=binary)
        with open_source(tmp_path / "words") as source:
            assert source.format == ("word2vec-binary" if binary else "word2vec-text")
            assert np.array_equal(gathered(source), VALUES)


def test_an_object_with_the_stream_interface_is_a_table():
    assert guess(TABLE) == "arrow"
    with open_source(TABLE) as source:
        assert np.array_equal(gathered(source), VALUES)


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="format must be one of word2vec-text, "):
        open_source(tmp_path, "csv")
    with pytest.raises(TypeError, match="got list"):
        open_source([1, 2])
    with pytest.raises(ValueError, match="s3://"):
        open_source("s3://bucket/vectors.npy")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "none.npy")


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text("0123456789. \nae-", max_size=40).map(str.encode))
def test_any_bytes_have_a_format_or_give_a_source_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(data)
    try:
        assert guess(path) in FORMATS
    except SourceError:
        pass
