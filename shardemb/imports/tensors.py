"""Tensors of models: safetensors, read by a parser of our own, and state dicts of torch, read by torch."""

from __future__ import annotations

import json
import math
import re
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base.paths import local_path
from shardemb.imports.arrays import (
    EXACT,
    ArraySource,
    File,
    RowMajor,
    convert,
    lossless,
    number_type,
    opened,
    zip_members,
)
from shardemb.imports.blocks import ReadOptions, chosen, listed, numbered, refuse, refuse_unused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import torch

    from shardemb.base.validation import Float32Array

MAX_HEADER = 25_000_000
"""Most bytes of JSON that are parsed, which is a hundred times what models of 200 files have in each. The format allows
four times as much, but a parsed document takes ten times its bytes of memory."""

INDEX = "model.safetensors.index.json"

_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I8": "int8", "U8": "uint8", "I16": "int16", "U16": "uint16",
}  # fmt: skip
"""Types of safetensors from which rows are read, and what NumPy and ml_dtypes call them."""

_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}  # fmt: skip
"""Bits of a value of each type of safetensors."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its bytes begin at `offset` of a file."""

    file: File
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    def rows(self) -> RowMajor:
        """Return it as rows.

        Raises
        ------
        SourceError
            float32 does not hold such numbers.
        """
        label = f"{self.file.name}, tensor {self.name!r}"
        if self.kind not in _TYPES:
            problem = f"has values of type {self.kind}; rows are read from {', '.join(_TYPES)}"
            raise refuse(self.file.name, f"tensor {self.name!r}", problem)
        return RowMajor(self.file, self.offset, self.shape[0], number_type(_TYPES[self.kind]), label)


@dataclass(frozen=True)
class ScaledRows:
    """Rows whose values are to be multiplied by a scale for each block of a row, or by one scale for all."""

    values: RowMajor
    scales: RowMajor | None
    blocks: int
    factor: np.float32

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return self.values.num_rows

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""
        self.values.fill(start, out)
        scales = np.full((len(out), self.blocks), self.factor)
        if self.scales is not None:
            self.scales.fill(start, scales)
        blocks = out.reshape(len(out), self.blocks, out.shape[1] // self.blocks)
        with np.errstate(
            invalid="ignore", over="ignore"
        ):  # as the model that has these numbers computes them
            blocks *= scales[:, :, None]


# ---- safetensors ------------------------------------------------------------------------------------------------


def open_safetensors(source: object, options: ReadOptions) -> ArraySource:
    """Open tensors in a ``.safetensors`` file, in the files of an index, or in a folder with one of these.

    Tensors of float8 that come with scales, as those of large language models do, are multiplied by them.

    Raises
    ------
    SourceError
        It is none; a header is damaged or does not fit its file; there is no such tensor, or there are several; an
        option is set that means nothing here.
    OSError
        A file is missing, or cannot be read.
    """
    path = local_path(source, "the file to import")
    refuse_unused(str(path), options, "member")
    with ExitStack() as resources:
        path = _in_folder(path) if path.is_dir() else path
        if path.suffix == ".json":
            tensors = _of_index(path, options.member, resources)
        else:
            tensors = safetensors_header(opened(path, resources))
        names = chosen(str(path), {name: tensor.shape for name, tensor in tensors.items()}, options.member)
        parts = [_scaled(tensors[name], tensors) for name in names]
        kinds = ["float32" if isinstance(part, ScaledRows) else part.dtype.name for part in parts]
        dim = tensors[names[0]].shape[1]
        found = ArraySource("safetensors", str(path), dim, lossless(*kinds), parts, options.limit)
        found.resources = resources.pop_all()
        return found


def safetensors_header(file: File) -> dict[str, Tensor]:
    """Read which tensors a file has, and check that they cover its bytes from the header to the end.

    Raises
    ------
    SourceError
        The header is damaged, or does not fit the file.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if not 2 <= length <= file.size - 8:
        problem = f"a header of {length} bytes does not fit into {file.size}: it is no safetensors file, or was cut off"
        raise refuse(file.name, "byte 0", problem)
    if length > MAX_HEADER:
        raise refuse(file.name, "byte 0", f"the header has {length} bytes; at most {MAX_HEADER} are read")
    document = _parsed(file.read(8, length), file.name, "the header")
    document.pop("__metadata__", None)
    begin = 8 + length
    spans, tensors = [], {}
    for name, entry in document.items():
        kind, shape, (start, stop) = _checked_entry(entry, file.name, name)
        spans.append((start, stop, name))
        tensors[name] = Tensor(file, name, kind, shape, begin + start)
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            how = (
                "overlaps the one before it"
                if start < end
                else f"leaves {start - end} bytes before it unused"
            )
            raise refuse(file.name, f"tensor {name!r}", f"begins at {start} of the data, and {how}")
        end = stop
    if begin + end != file.size:
        problem = (
            f"the header promises {end} bytes of data, but {file.size - begin} follow: cut off, or damaged"
        )
        raise refuse(file.name, f"byte {begin}", problem)
    return tensors


def _parsed(data: bytes, name: str, what: str) -> dict[str, Any]:
    """Parse a JSON object whose names are different, and so are those of the objects in it."""
    try:
        if not data.startswith(b"{"):
            raise ValueError(f"it begins with {data[:1]!r} instead of '{{'")
        document: dict[str, Any] = json.loads(data.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise refuse(name, what, f"is no JSON object: {error}") from error
    return document


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _checked_entry(entry: object, name: str, tensor: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Return type, shape, and first and last offset of a tensor, if these fit together."""
    place = f"tensor {tensor!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise refuse(name, place, f"needs dtype, shape and data_offsets, and has {entry!r:.80}")
    kind, shape, offsets = entry["dtype"], _naturals(entry["shape"]), _naturals(entry["data_offsets"])
    if not isinstance(kind, str) or shape is None or offsets is None or len(offsets) != 2:
        raise refuse(name, place, f"dtype, shape or data_offsets are not understood: {entry!r:.120}")
    start, stop = offsets
    bits = _BITS.get(kind, 0) * math.prod(shape)
    if kind in _BITS and bits != 8 * (stop - start):
        problem = f"{shape} of {kind} take {bits / 8:g} bytes, but data_offsets are {start} and {stop}"
        raise refuse(name, place, problem)
    if stop < start:
        raise refuse(name, place, f"data_offsets {start} and {stop} are in the wrong order")
    return kind, shape, (start, stop)


def _naturals(given: object) -> tuple[int, ...] | None:
    """Return a list of a few numbers from 0 to 2**63 - 1 as a tuple; None if it is something else."""
    if not isinstance(given, list) or len(given) > 32:
        return None
    fits = all(type(each) is int and 0 <= each < 2**63 for each in given)
    return tuple(given) if fits else None


def _in_folder(folder: Path) -> Path:
    """Return the index in a folder, or the only safetensors file."""
    if (folder / INDEX).exists():
        return folder / INDEX
    found = sorted(each for each in folder.iterdir() if each.suffix == ".safetensors")
    if len(found) != 1:
        names = listed([each.name for each in found])
        problem = f"the folder has no {INDEX} and not one .safetensors file, but {len(found)}: {names}"
        raise refuse(str(folder), "", problem)
    return found[0]


def _of_index(path: Path, member: str | None, resources: ExitStack) -> dict[str, Tensor]:
    """Read the headers of the files of an index that have what is asked for; others may be missing."""
    index = opened(path, resources)
    if index.size > MAX_HEADER:
        raise refuse(index.name, "", f"has {index.size} bytes; an index of at most {MAX_HEADER} is read")
    homes = _parsed(index.read(0, index.size), index.name, "the index").get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(home, str) for home in homes.values()):
        raise refuse(index.name, "", 'has no "weight_map" from names of tensors to names of files')
    wanted = list(homes) if member is None else [member] if member in homes or "*" not in member else []
    wanted = wanted or numbered(index.name, list(homes), str(member))
    every = [each for name in wanted for each in (name, *_scale_names(name)) if each in homes]
    tensors: dict[str, Tensor] = {}
    for home in dict.fromkeys(homes[name] for name in every):
        if re.search(r"[/\\\0]", home) or home in ("", ".", ".."):
            raise refuse(index.name, "", f"{home!r} is no name of a file beside it")
        there = safetensors_header(opened(path.parent / home, resources))
        tensors |= {name: tensor for name, tensor in there.items() if homes.get(name) == home}
    for name in every:
        if name not in tensors:
            raise refuse(
                index.name, "", f"{homes[name]} has no tensor {name!r}, which the index says is there"
            )
    # Without any, the name asked for is unknown: the caller says so, with those that there are.
    return tensors or {name: Tensor(index, name, "", (), 0) for name in homes}


# ---- scales -----------------------------------------------------------------------------------------------------


def _scale_names(name: str) -> Iterator[str]:
    """Iterate over what the scales of a tensor may be called: beside it, or beside the tensors that it is part of."""
    parent = name.rpartition(".")[0]
    whole = parent.rpartition(".")[0]
    yield from (f"{name}_scale", f"{name}_scale_inv", f"{parent}.weight_scale", f"{parent}.weight_scale_inv")
    yield from (f"{parent}.scale", f"{whole}.weight_scale", f"{whole}.weight_scale_inv")


def _scaled(tensor: Tensor, tensors: Mapping[str, Tensor]) -> RowMajor | ScaledRows:
    """Return the rows of a tensor; if it has one byte a value and comes with scales, multiplied by these.

    Values of float8 without their scale are wrong by a factor, which nothing downstream would notice.
    """
    rows = tensor.rows()
    found = next(
        (each for each in _scale_names(tensor.name) if each in tensors and each != tensor.name), None
    )
    if rows.dtype.itemsize > 1 or found is None:
        return rows
    scale = tensors[found]
    if not tensor.kind.startswith("F8") or scale.kind.startswith(("U", "I")):
        problem = (
            f"is {tensor.kind} and has scales of {scale.kind} in {found!r}: which numbers these bytes are is not said; "
            f"multiply them first and save the product as BF16"
        )
        raise refuse(tensor.file.name, f"tensor {tensor.name!r}", problem)
    if math.prod(scale.shape) == 1:
        factor = np.empty((1, 1), np.float32)
        Tensor(scale.file, found, scale.kind, (1, 1), scale.offset).rows().fill(0, factor)
        return ScaledRows(rows, None, 1, factor[0, 0])
    blocks = scale.shape[1] if len(scale.shape) == 2 else 0
    if not blocks or scale.shape[0] != rows.num_rows or tensor.shape[1] % blocks:
        problem = (
            f"has scales in {found!r} of shape {scale.shape}, which is neither one number nor equal blocks of each "
            f"row; multiply them first and save the product as BF16"
        )
        raise refuse(tensor.file.name, f"tensor {tensor.name!r}", problem)
    return ScaledRows(rows, scale.rows(), blocks, np.float32(1))


# ---- torch ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorRows:
    """Rows of a tensor of torch, whose memory is a mapping of its file."""

    tensor: torch.Tensor
    label: str

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.tensor)

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""
        import torch

        rows = self.tensor[start : start + len(out)]
        if rows.dtype == torch.float64:
            convert(rows.numpy(), out, self.label, start)
        else:
            torch.from_numpy(out).copy_(rows)


def open_torch(source: object, options: ReadOptions) -> ArraySource:
    """Open a tensor of a file that ``torch.save`` has written: of a state dict, or of nested dicts, by dotted name.

    Nothing in the file is run: torch reads tensors and containers alone (``weights_only=True``), and maps the values.

    Raises
    ------
    SourceError
        It is no such file, or one of more than tensors; there is no such tensor, or there are several; an option is
        set that means nothing here.
    ModuleNotFoundError
        torch is not installed.
    OSError
        The file cannot be read.
    """
    path = local_path(source, "the file to import")
    name = str(path)
    refuse_unused(name, options, "member")
    with ExitStack() as checked:
        if opened(path, checked).read(0, 4) != b"PK\x03\x04":
            problem = "is no zip archive, as torch.save writes since version 1.6; load it with torch and save it again"
            raise refuse(name, "", problem)
    if any(info.compress_type != zipfile.ZIP_STORED for info in zip_members(path)):
        raise refuse(name, "", "has compressed members, which torch.save never writes")
    try:
        tensors = dict(_tensors(_loaded(path), "", set()))
    except RecursionError as error:
        raise refuse(name, "", "containers are nested too deeply") from error
    names = chosen(name, {each: tuple(tensor.shape) for each, tensor in tensors.items()}, options.member)
    parts = [
        TensorRows(_checked_tensor(tensors[each], name, each), f"{name}, tensor {each!r}") for each in names
    ]
    kinds = [str(part.tensor.dtype).removeprefix("torch.") for part in parts]
    return ArraySource("torch", name, parts[0].tensor.shape[1], lossless(*kinds), parts, options.limit)


def _loaded(path: Path) -> object:
    try:
        import torch
    except ModuleNotFoundError as error:
        msg = f"{path}: to read what torch.save has written takes torch: pip install torch"
        raise ModuleNotFoundError(msg, name="torch") from error
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # of many types, for files that are damaged or hold other things than tensors
        first = str(error).strip().partition("\n")[0]
        problem = f"torch cannot read it as tensors alone, without running what else it says: {first}"
        raise refuse(str(path), "", problem) from error


def _tensors(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
    """Iterate over the tensors in nested containers, by dotted name; a container is looked into once."""
    if hasattr(value, "untyped_storage"):
        yield name or "tensor", value
        return
    inner: Iterable[tuple[object, Any]] = ()
    if id(value) not in seen and isinstance(value, dict | list | tuple):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        seen.add(id(value))
    for key, each in inner:
        yield from _tensors(each, f"{name}.{key}" if name else str(key), seen)


def _checked_tensor(tensor: torch.Tensor, name: str, member: str) -> torch.Tensor:
    """Return a tensor whose numbers are all in the file, one by one, and of a type that float32 holds."""
    import torch

    kind, place = str(tensor.dtype).removeprefix("torch."), f"tensor {member!r}"
    if kind not in EXACT or tensor.is_quantized:
        raise refuse(name, place, f"the values are {kind}; convert them first: tensor.float()")
    if tensor.layout is not torch.strided:
        raise refuse(name, place, f"its layout is {tensor.layout}; convert it first: tensor.to_dense()")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise refuse(name, place, "several of its values are the same bytes; save tensor.contiguous()")
    return tensor.detach()
