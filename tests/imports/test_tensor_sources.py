"""safetensors and state dicts of torch: what their own writers write is read, and what they would not is refused."""

import json
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import gathered

from shardemb.errors import SourceError
from shardemb.imports import blocks, tensors
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.tensors import open_safetensors, open_torch

VALUES = np.random.default_rng(1).standard_normal((40, 6)).astype(np.float32)

KINDS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I8": "i1", "U8": "u1", "I16": "i2", "U16": "u2",
    "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of nine rows of six values, so that small tensors have several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9 * 6 * 4)


def packed(header, data=b"", pad=0):
    header = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b" " * pad
    return struct.pack("<Q", len(header)) + header + data


def model(arrays, pad=0, **kinds):
    """A safetensors file of some arrays; of those whose type NumPy does not know, it is given."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {np.dtype(kind): name for name, kind in KINDS.items()} | {np.dtype("i8"): "I64"}
    for name, array in arrays.items():
        kind = kinds.get(name, names[array.dtype])
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    return packed(header, data, pad)


def rows_of(path, **options):
    with open_safetensors(path, ReadOptions(**options)) as source:
        return gathered(source)


def written(tmp_path, data, name="m.safetensors"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def refusal(path, **options):
    with pytest.raises(SourceError) as error:
        rows_of(path, **options)
    return str(error.value)


# ---- safetensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_type_are_read(tmp_path, kind):
    array = np.abs(VALUES * 8).astype(KINDS[kind])
    path = written(tmp_path, model({"w": array}))
    assert np.array_equal(rows_of(path), array.astype(np.float32))


@pytest.mark.parametrize(("kind", "name"), [("F16", "float16"), ("BF16", "bfloat16"), ("F8_E5M2", "float8_e5m2"),
                                            ("F8_E8M0", "float32"), ("I8", "float32")])  # fmt: skip
def test_what_holds_the_rows_without_loss_is_named(tmp_path, kind, name):
    array = np.abs(VALUES).astype(KINDS[kind])
    with open_safetensors(written(tmp_path, model({"w": array})), ReadOptions()) as source:
        assert (source.format, source.dtype, source.dim, source.num_rows) == ("safetensors", name, 6, 40)


def test_the_only_tensor_of_rows_is_read(tmp_path):
    arrays = {"bias": VALUES[0], "w": VALUES, "cube": np.zeros((1, 2, 3), "f4"), "empty": np.zeros(0, "f4")}
    path = written(tmp_path, model(arrays, pad=4096))
    assert np.array_equal(rows_of(path), VALUES)
    assert np.array_equal(rows_of(path, limit=7), VALUES[:7])


def test_of_several_tensors_one_is_chosen(tmp_path):
    path = written(tmp_path, model({"a.weight": VALUES, "b.weight": VALUES * 2}))
    assert "a.weight (40, 6), b.weight (40, 6)" in refusal(path)
    assert "has no 'c.weight'" in refusal(path, member="c.weight")
    assert np.array_equal(rows_of(path, member="b.weight"), VALUES * 2)


def test_parts_are_joined_by_number(tmp_path):
    parts = {f"t.shard_{n}.weight": VALUES[3 * n : 3 * n + 3] for n in range(13)}
    path = written(tmp_path, model(dict(sorted(parts.items())) | {"t.shard_x.weight": VALUES}))
    with open_safetensors(path, ReadOptions(member="t.shard_*.weight")) as source:
        assert np.array_equal(gathered(source), VALUES[:39])
        assert np.array_equal(source.read(2, 31), VALUES[2:31])
    mixed = {"w.0": VALUES.astype("f2"), "w.1": VALUES}
    with open_safetensors(written(tmp_path, model(mixed)), ReadOptions(member="w.*")) as source:
        assert source.dtype == "float32"
        assert np.array_equal(gathered(source), np.concatenate([mixed["w.0"], VALUES]))


def test_files_of_an_index_are_read_and_others_may_be_missing(tmp_path):
    homes = {f"w.{n}": f"model-{n % 2}.safetensors" for n in range(4)} | {"lm_head": "model-2.safetensors"}
    for home in range(2):
        arrays = {f"w.{n}": VALUES[10 * n : 10 * n + 10] for n in range(4) if n % 2 == home}
        written(tmp_path, model(arrays), f"model-{home}.safetensors")
    index = written(tmp_path, json.dumps({"weight_map": homes}).encode(), tensors.INDEX)
    for source in (tmp_path, index):
        assert np.array_equal(rows_of(source, member="w.*"), VALUES)
        assert np.array_equal(rows_of(source, member="w.2"), VALUES[20:30])
        assert "has no 'w.9'; it has w.0, w.1" in refusal(source, member="w.9")
        with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
            rows_of(source, member="lm_head")


def test_an_index_leads_nowhere_else(tmp_path):
    written(tmp_path, model({"w": VALUES}))
    (tmp_path / "inner").mkdir()
    for home in ("../m.safetensors", str(tmp_path / "m.safetensors"), "..", "a\0b"):
        written(tmp_path / "inner", json.dumps({"weight_map": {"w": home}}).encode(), tensors.INDEX)
        assert "no name of a file beside it" in refusal(tmp_path / "inner")
    written(tmp_path, json.dumps({"weight_map": {"v": "m.safetensors"}}).encode(), tensors.INDEX)
    assert "has no tensor 'v'" in refusal(tmp_path)
    for document in ("{}", '{"weight_map": 3}', '{"weight_map": {"v": 3}}', "[]", "{"):
        written(tmp_path, document.encode(), tensors.INDEX)
        refusal(tmp_path)


def test_a_folder_with_one_file_is_that_file(tmp_path):
    assert "but 0" in refusal(tmp_path)
    written(tmp_path, model({"w": VALUES}))
    assert np.array_equal(rows_of(tmp_path), VALUES)
    written(tmp_path, model({"w": VALUES}), "n.safetensors")
    assert "m.safetensors, n.safetensors" in refusal(tmp_path)


def test_bytes_are_multiplied_by_their_scales(tmp_path):
    values = (VALUES * 8).astype(ml_dtypes.float8_e4m3fn)
    blocks_of_rows = np.abs(VALUES[:, :2]).astype(ml_dtypes.float8_e8m0fnu)
    parts = {"e.shard_0.weight": values[:25], "e.shard_1.weight": values[25:]}
    one = written(tmp_path, model(parts | {"e.weight_scale": np.float32([0.5])}))
    with open_safetensors(one, ReadOptions(member="e.shard_*.weight")) as source:
        assert source.dtype == "float32"
        assert np.array_equal(gathered(source), values.astype("f4") * np.float32(0.5))
    some = written(tmp_path, model({"e.weight": values, "e.weight_scale_inv": blocks_of_rows}))
    expected = values.astype("f4") * np.repeat(blocks_of_rows.astype("f4"), 3, axis=1)
    assert np.array_equal(rows_of(some, member="e.weight"), expected)
    assert np.array_equal(rows_of(some, member="e.weight_scale_inv"), blocks_of_rows.astype("f4"))
    far = written(
        tmp_path, model({"a.b.c.weight": values, "a.scale": np.float32([2]), "scale": np.float32([3])})
    )
    assert np.array_equal(rows_of(far), values.astype("f4"))
    other = written(tmp_path, model({"e.weight": values, "e.scale": VALUES[:2]}))
    assert "neither one number nor equal blocks" in refusal(other, member="e.weight")
    for weight, scale in ((values, np.uint8([127])), (values.view(np.uint8), np.float32([0.5]))):
        other = written(tmp_path, model({"e.weight": weight, "e.weight_scale": scale}))
        assert "which numbers these bytes are is not said" in refusal(other)
    plain = written(tmp_path, model({"e.weight": VALUES, "e.scale": np.float32([0.5])}))
    assert np.array_equal(rows_of(plain), VALUES)


def entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


NULL, FULL = b"\0" * 24, {"dtype": "F32", "shape": [1, 1]}

REFUSED = {
    "nothing": (b"", "header of 0 bytes"),
    "a short header": (packed(entry(), NULL)[:40], "does not fit"),
    "a header of any size": (b"\xff" * 8 + b"{", "does not fit"),
    "text": (b"word 1.0 2.0 3.0\n" * 4, "does not fit"),
    "no object": (packed(b"[1, 2, 3]"), "no JSON object"),
    "blanks first": (packed(b" {}"), "no JSON object"),
    "no JSON": (packed(b'{"w": '), "no JSON object"),
    "no UTF-8": (packed(b'{"\xff": 1}'), "no JSON object"),
    "deep nesting": (packed(b'{"w":' + b"[" * 100_000), "no JSON object"),
    "long numbers": (packed(b'{"w":' + b"1" * 5000 + b"}"), "no JSON object"),
    "a name twice": (packed(b'{"w": 1, "w": 2}'), "'w' is there twice"),
    "a field twice": (packed(b'{"w": {"shape": [], "shape": []}}'), "'shape' is there twice"),
    "no entry": (packed({"w": 1}), "needs dtype, shape and data_offsets"),
    "a missing field": (packed({"w": FULL}), "needs dtype, shape and data_offsets"),
    "a negative shape": (packed(entry(shape=[-2, -3]), NULL), "not understood"),
    "a fractional shape": (packed(entry(shape=[2.0, 3]), NULL), "not understood"),
    "truth for one": (packed(entry(shape=[True, 6]), NULL), "not understood"),
    "a type that is no text": (packed(entry(dtype=[]), NULL), "not understood"),
    "one offset": (packed(entry(data_offsets=[0]), NULL), "not understood"),
    "too few bytes": (packed(entry(data_offsets=[0, 20]), NULL[:20]), "take 24 bytes"),
    "a shape beyond 64 bits": (packed(entry(shape=[2**62, 2**62]), NULL), "take .* bytes"),
    "a wrong order": (packed(entry(dtype="X", data_offsets=[24, 0]), NULL), "wrong order"),
    "a hole": (packed(entry(data_offsets=[8, 32]), NULL + NULL[:8]), "leaves 8 bytes"),
    "an overlap": (
        packed(entry() | {"v": FULL | {"data_offsets": [20, 24]}}, NULL),
        "'v'.*overlaps",
    ),
    "a short file": (packed(entry(), NULL[:20]), "promises 24 bytes of data, but 20 follow"),
    "a long file": (packed(entry(), NULL + b"\0"), "promises 24 bytes of data, but 25 follow"),
    "wide integers": (packed(entry(dtype="I64", shape=[1, 3]), NULL), "type I64"),
    "half bytes": (packed(entry(dtype="F4", shape=[2, 24]), NULL), "type F4"),
    "an unknown type": (packed(entry(dtype="F128"), NULL), "type F128"),
    "no rows at all": (packed(entry(shape=[6]), NULL), "no arrays have two dimensions"),
    "rows without values": (packed(entry(shape=[7, 0], data_offsets=[0, 0])), "0 values"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0\0\0\0", "decompress it first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_damaged_is_refused(tmp_path, case):
    data, message = REFUSED[case]
    with pytest.raises(SourceError, match=message):
        rows_of(written(tmp_path, data))


def test_a_long_header_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "MAX_HEADER", 100)
    assert "at most 100 are read" in refusal(written(tmp_path, model({"w": VALUES}, pad=100)))


def test_an_option_without_a_meaning_is_refused(tmp_path):
    assert "columns" in refusal(written(tmp_path, model({"w": VALUES})), columns=("x",))


@settings(max_examples=150)
@given(data=st.data())
def test_any_bytes_give_rows_or_a_source_error(tmp_path_factory, data):
    whole = bytearray(model({"w": VALUES[:2], "v": VALUES[0]}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, 8) | st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(whole[: data.draw(st.sampled_from([len(whole), len(whole) - 3, 12]))])
    try:
        assert rows_of(path).nbytes <= 4 * len(whole)
    except SourceError:
        pass


@pytest.mark.parametrize("kind", ["F32", "F16", "F64", "I8"])
def test_what_safetensors_writes_is_read(tmp_path, kind):
    foreign = pytest.importorskip("safetensors.numpy")
    array = (VALUES * 8).astype(KINDS[kind])
    foreign.save_file({"w": array, "b": array[0].copy()}, tmp_path / "m.safetensors", {"format": "pt"})
    assert np.array_equal(rows_of(tmp_path / "m.safetensors"), array.astype("f4"))


def test_what_safetensors_writes_of_torch_is_read(tmp_path):
    torch, foreign = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    tensor = torch.tensor(VALUES)
    for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        foreign.save_file({"w": tensor.to(kind)}, tmp_path / "m.safetensors")
        assert np.array_equal(rows_of(tmp_path / "m.safetensors"), tensor.to(kind).float().numpy())


# ---- torch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def rows_of_torch(path, **options):
    with open_torch(path, ReadOptions(**options)) as source:
        return gathered(source)


def refusal_of_torch(path, **options):
    with pytest.raises(SourceError) as error:
        rows_of_torch(path, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "kind", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int16", "uint16"]
)
def test_tensors_of_every_type_are_read(tmp_path, torch, kind):
    tensor = torch.tensor(np.abs(VALUES * 8)).to(getattr(torch, kind))
    torch.save(tensor, tmp_path / "a.pt")
    with open_torch(tmp_path / "a.pt", ReadOptions()) as source:
        assert source.dtype == (kind if kind.startswith(("b", "float8", "float16")) else "float32")
        assert np.array_equal(gathered(source), tensor.float().numpy())
        assert np.array_equal(source.read(3, 5), tensor.float().numpy()[3:5])


def test_a_state_dict_is_read(tmp_path, torch):
    module = torch.nn.Sequential(torch.nn.Embedding(40, 6), torch.nn.LayerNorm(6))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    expected = module[0].weight.detach().numpy()
    assert np.array_equal(rows_of_torch(tmp_path / "a.pt"), expected)
    assert np.array_equal(rows_of_torch(tmp_path / "a.pt", member="0.weight", limit=3), expected[:3])


def test_nested_tensors_have_dotted_names(tmp_path, torch):
    one, two = torch.tensor(VALUES), torch.tensor(VALUES.T)
    nested = {"model": {"a": one, "parts": [one[:20], one[20:]], 3: two.T}, "step": 7}
    nested["self"] = nested
    torch.save(nested, tmp_path / "a.pt")
    assert (
        "model.a (40, 6), model.parts.0 (20, 6), model.parts.1 (20, 6), model.3 (40, 6)"
        in refusal_of_torch(tmp_path / "a.pt")
    )
    for member in ("model.a", "model.parts.*", "model.3"):
        assert np.array_equal(rows_of_torch(tmp_path / "a.pt", member=member), VALUES)


def test_tensors_that_are_no_rows_of_numbers_are_refused(tmp_path, torch):
    tensor = torch.tensor(VALUES)
    for member, message in {
        tensor.long(): "int64.*tensor.float",
        tensor.bool(): "bool",
        tensor.to_sparse(): "to_dense|cannot read",
        tensor[:1, :].expand(10**9, 6): "contiguous",
        tensor[0]: "no arrays have two dimensions",
    }.items():
        torch.save({"w": member}, tmp_path / "a.pt")
        with pytest.raises(SourceError, match=message):
            rows_of_torch(tmp_path / "a.pt")
    large = tensor.double()
    large[30, 1] = 1e300
    torch.save(large, tmp_path / "a.pt")
    assert "row 30" in refusal_of_torch(tmp_path / "a.pt")


def test_a_pickle_is_not_run(tmp_path, torch):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("it was run",)

    torch.save({"w": torch.tensor(VALUES), "bomb": Bomb()}, tmp_path / "a.pt")
    assert "without running" in refusal_of_torch(tmp_path / "a.pt")


def test_files_that_torch_does_not_write_are_refused(tmp_path, torch):
    tensor = torch.tensor(VALUES)
    torch.save(tensor, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert "save it again" in refusal_of_torch(tmp_path / "old.pt")
    torch.save(tensor, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    written(tmp_path, data[: len(data) // 2], "short.pt")
    assert "short.pt" in refusal_of_torch(tmp_path / "short.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "compressed" in refusal_of_torch(tmp_path / "b.pt")


def test_without_torch_the_error_says_how_to_get_it(tmp_path, monkeypatch, torch):
    import sys

    torch.save(torch.tensor(VALUES), tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        open_torch(tmp_path / "a.pt", ReadOptions())
