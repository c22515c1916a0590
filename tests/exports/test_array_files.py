"""Exports to .npy and safetensors: what NumPy and safetensors read, keys beside them, and where data begin."""

import json

import ml_dtypes
import numpy as np
import pytest
from support.exports import DIM, WORDS, any_bits, keyed_table, nothing_left, plain_table, same_bits

import shardemb
from shardemb import exports
from shardemb.exports import arrow
from shardemb.storage import files

DTYPES = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
    "float8_e4m3fn": ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    "float8_e5m2": ("F8_E5M2", ml_dtypes.float8_e5m2),
    "raw": ("U8", np.uint8),
    shardemb.dtypes.ScaledInt8(): ("F32", np.float32),
}


def read_safetensors(path):
    """Read a file as its description says, and check what that says."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(data[8 : 8 + length])
    assert data[8:9] == b"{"
    assert header.pop("__metadata__")["format"] == "pt"
    dtypes = dict(DTYPES.values())
    tensors, end = {}, 0
    for name, each in header.items():
        start, stop = each["data_offsets"]
        assert start == end
        end = stop
        tensors[name] = np.frombuffer(
            data[8 + length + start : 8 + length + stop], dtypes[each["dtype"]]
        ).reshape(each["shape"])
    assert 8 + length + end == len(data)
    return tensors


def table_of(store, dtype, num_rows=1500):
    table = store.create_table(
        "t", num_embeddings=num_rows, embedding_dim=DIM, dtype=dtype, rows_per_shard=512
    )
    if dtype == "raw":
        rows = any_bits(num_rows, DIM).view(np.uint8)[:, :DIM]
    else:
        rows = np.random.default_rng(0).normal(size=(num_rows, DIM)).astype(np.float32)
    table.write(np.arange(num_rows), rows)
    return table


@pytest.fixture(params=[None, 64], ids=["whole", "small batches"])
def batches(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(arrow, "MAX_ROWS", request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_has_the_dtype_of_the_table(store, tmp_path, batches, dtype):
    table = table_of(store, dtype)
    report = table.export(tmp_path / "t.safetensors")
    assert (report.num_rows, report.files) == (1500, (tmp_path / "t.safetensors",))
    (tensor,) = read_safetensors(tmp_path / "t.safetensors").values()
    form = dtype if isinstance(dtype, str) else "float32"
    assert same_bits(tensor, table.lookup(np.arange(1500), dtype=form))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_npy_has_what_numpy_has(store, tmp_path, batches, dtype):
    table = table_of(store, dtype)
    table.export(tmp_path / "t.npy", rows=(100, 1400))
    form = dtype if dtype in ("float16", "raw") else "float32"
    mapped = np.load(tmp_path / "t.npy", mmap_mode="r")
    assert same_bits(mapped, table.lookup(np.arange(100, 1400), dtype=form))


def test_other_rows_than_a_range(store, tmp_path, batches):
    table, rows = plain_table(store)
    mask = np.random.default_rng(0).random(1500) < 0.4
    table.export(tmp_path / "t.npy", where=mask)
    table.export(tmp_path / "t.safetensors", where=mask)
    assert same_bits(np.load(tmp_path / "t.npy"), rows[mask])
    assert same_bits(read_safetensors(tmp_path / "t.safetensors")["embedding"], rows[mask])


@pytest.mark.parametrize(
    ("keys", "key_type"),
    [(WORDS, "string"), ([word.encode() for word in WORDS], "bytes"), ([5, -3, 2**60, 9], "int64")],
)
def test_keys_go_to_a_file_beside_it(store, tmp_path, monkeypatch, keys, key_type):
    monkeypatch.setattr(arrow, "MAX_ROWS", 3)
    table, kept, rows = keyed_table(store, keys, (keys[2],), key_type)
    for suffix in ("npy", "safetensors"):
        report = table.export(tmp_path / f"w.{suffix}")
        assert report.files == (tmp_path / f"w.{suffix}", tmp_path / "w.tokens.txt")
        assert report.num_rows == len(kept)
        lines = (tmp_path / "w.tokens.txt").read_bytes().split(b"\n")
        assert lines == [*(key if key_type == "bytes" else str(key).encode() for key in kept), b""]
        (tmp_path / "w.tokens.txt").unlink()
    assert same_bits(np.load(tmp_path / "w.npy"), rows)
    assert same_bits(read_safetensors(tmp_path / "w.safetensors")["embedding"], rows)


def test_a_key_with_a_line_break_is_refused_and_nothing_is_left(store, tmp_path):
    table, _, _ = keyed_table(store, ["a", "with blank", "b\nc"], ())
    with pytest.raises(ValueError, match=r"key 'b\\nc' of row 4 has a line break"):
        table.export(tmp_path / "w.npy")
    assert nothing_left(tmp_path)
    table.export(tmp_path / "w.npy", where=["a", "with blank"])
    assert (tmp_path / "w.tokens.txt").read_text() == "a\nwith blank\n"


@pytest.mark.parametrize("keyed", [False, True])
def test_a_large_tensor_becomes_several_files(store, tmp_path, keyed):
    if keyed:
        table, _, rows = keyed_table(store)
        most, sizes = 3 * DIM * 4, [3, 3, 2]
    else:
        table, rows = plain_table(store)
        most, sizes = 700 * DIM * 4 + 5, [700, 700, 100]
    report = table.export(tmp_path / "t.safetensors", exports.Safetensors(tensor="w", max_bytes=most))
    names = [f"t-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    expected = [*names, "t.safetensors.index.json", *(["t.tokens.txt"] if keyed else [])]
    assert sorted(path.name for path in report.files) == sorted(expected)
    assert nothing_left(tmp_path, *expected)
    index = json.loads((tmp_path / "t.safetensors.index.json").read_text())
    assert index["weight_map"] == {f"w.{k}": name for k, name in enumerate(names)}
    assert index["metadata"]["total_size"] == rows.nbytes
    parts = [read_safetensors(tmp_path / name)[f"w.{k}"] for k, name in enumerate(names)]
    assert [len(part) for part in parts] == sizes
    assert same_bits(np.concatenate(parts), rows)


@pytest.mark.parametrize("name", ["t.npy", "t.safetensors"])
def test_no_rows(store, tmp_path, name):
    table, _ = plain_table(store)
    assert table.export(tmp_path / name, where=[]).num_rows == 0
    found = np.load(tmp_path / name) if name == "t.npy" else read_safetensors(tmp_path / name)["embedding"]
    assert found.shape == (0, DIM)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_the_library_reads_them(store, tmp_path, dtype):
    pytest.importorskip("safetensors")  # before torch, which takes seconds
    torch, load = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").load_file
    table = table_of(store, dtype)
    table.export(tmp_path / "t.safetensors")
    (tensor,) = load(tmp_path / "t.safetensors").values()
    assert tensor.dtype == getattr(torch, dtype)
    raw = tensor.view(torch.uint8).numpy().reshape(1500, -1)
    assert same_bits(raw, table.lookup(np.arange(1500), dtype="raw"))


@pytest.mark.parametrize("name", ["t.npy", "t.safetensors", "t.bin", "t.vec", "t.arrow"])
@pytest.mark.parametrize("call", ["write", "sync", "rename"])
def test_a_failure_leaves_what_was_there(store, tmp_path, monkeypatch, name, call):
    """Of a table by key, whose rows and keys are two files."""
    table, _, _ = keyed_table(store)
    (tmp_path / name).write_text("of before")
    original, calls = getattr(files, call), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if call == "write" else 1):
            raise OSError(5, "broken")
        return original(*arguments)

    monkeypatch.setattr(files, call, failing)
    with pytest.raises(OSError, match="broken"):
        table.export(tmp_path / name)
    assert (tmp_path / name).read_text() == "of before"
    assert nothing_left(tmp_path, name)
