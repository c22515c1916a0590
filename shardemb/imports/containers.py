"""Arrays in containers: datasets of HDF5, read by h5py, and arrays of zarr."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardemb.base.paths import local_path
from shardemb.errors import SourceError
from shardemb.imports.arrays import (
    EXACT,
    ArraySource,
    checked_type,
    convert,
    lossless,
    opened,
)
from shardemb.imports.blocks import ReadOptions, chosen, refuse, refuse_unused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array


@dataclass(frozen=True)
class SlicedRows:
    """Rows that a library reads: ``read(start, stop)`` returns some of them, of any type, safe from several threads."""

    num_rows: int
    read: Callable[[int, int], NDArray[Any]]
    label: str

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""
        stop = start + len(out)
        try:
            rows = self.read(start, stop)
        except Exception as error:  # of many types: each library has its own, and each of their codecs
            raise refuse(self.label, f"rows {start} to {stop - 1}", f"cannot be read: {error}") from error
        convert(rows, out, self.label, start)


def open_hdf5(source: object, options: ReadOptions) -> ArraySource:
    """Open a dataset of an HDF5 file, which is chosen by `member` if several have two dimensions.

    Raises
    ------
    SourceError
        It is no HDF5 file, or damaged; there is no such dataset, or there are several; its values are no numbers that
        float32 holds; an option is set that means nothing here.
    ModuleNotFoundError
        h5py is not installed.
    OSError
        The file cannot be read.
    """
    path = local_path(source, "the file to import")
    name = str(path)
    refuse_unused(name, options, "member")
    with ExitStack() as checked:
        opened(path, checked)
    try:
        import h5py
    except ModuleNotFoundError as error:
        msg = f"{path}: to read HDF5 takes h5py: pip install h5py"
        raise ModuleNotFoundError(msg, name="h5py") from error
    with ExitStack() as resources:
        try:
            file = resources.enter_context(h5py.File(path, "r"))
            found: dict[str, Any] = {}
            # Links to other files are not followed: what they lead to is no part of this one.
            file.visititems(lambda each, item: found.update({each: item}) if hasattr(item, "dtype") else None)
            return _source("hdf5", name, found, options, resources)
        except SourceError:
            raise
        except Exception as error:  # of many types, for files that are damaged
            raise refuse(name, "", f"h5py cannot read it: {error}") from error


def open_zarr(source: object, options: ReadOptions) -> ArraySource:
    """Open an array of zarr, of format 2 or 3, or one in a group, chosen by `member` if several have two dimensions.

    Raises
    ------
    SourceError
        It is neither, or damaged; there is no such array, or there are several; its values are no numbers that float32
        holds; an option is set that means nothing here.
    """
    import zarr

    path = local_path(source, "the folder to import")
    name = str(path)
    refuse_unused(name, options, "member")
    if not path.is_dir():
        path.stat()  # one that is missing is told as such
        raise refuse(name, "", "is no folder, as zarr's arrays are")
    try:
        node: Any = zarr.open(str(path), mode="r")
        found = {"the array": node} if isinstance(node, zarr.Array) else dict(_arrays(node))
        if isinstance(node, zarr.Array) and options.member is not None:
            raise refuse(name, "", f"is an array, and has no member {options.member!r}")
        return _source("zarr", name, found, options, ExitStack())
    except SourceError:
        raise
    except Exception as error:  # of many types, for documents that are damaged
        raise refuse(name, "", f"zarr cannot read it: {error}") from error


def _arrays(group: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Iterate over the arrays of a group and of those in it, by path."""
    for path, node in group.members(max_depth=None):
        if hasattr(node, "dtype"):
            yield path, node


def _source(
    form: str, name: str, found: dict[str, Any], options: ReadOptions, resources: ExitStack
) -> ArraySource:
    """Return what reads the chosen ones of some arrays, whole chunks at a time."""
    member = None if options.member is None else options.member.strip("/")
    shapes = {each: tuple(array.shape) for each, array in found.items()}
    numbers = {each: shape for each, shape in shapes.items() if found[each].dtype.name in EXACT}
    names = chosen(name, numbers if member is None and numbers else shapes, member)
    arrays = [found[each] for each in names]
    kinds = [checked_type(array.dtype, name, each).name for each, array in zip(names, arrays, strict=True)]
    parts = [
        SlicedRows(array.shape[0], _slices(array), f"{name}, {each}")
        for each, array in zip(names, arrays, strict=True)
    ]
    chunks = max(array.chunks[0] if array.chunks else 1 for array in arrays)
    align = min(max(chunks, 1), max(part.num_rows for part in parts) or 1)
    found_source = ArraySource(
        form, name, arrays[0].shape[1], lossless(*kinds), parts, options.limit, None, align
    )
    found_source.resources = resources.pop_all()
    return found_source


def _slices(array: Any) -> Callable[[int, int], NDArray[Any]]:  # noqa: ANN401
    return lambda start, stop: array[start:stop]
