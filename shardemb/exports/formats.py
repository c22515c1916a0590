"""The formats that rows are exported in: what can be chosen about each, and who writes it.

A format is a small frozen dataclass, as an optimizer is: its fields are its options. Its name, or the suffix of the
target, stands for the one with the defaults.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardemb.base.progress import Progress
    from shardemb.exports.parquet import Encoding, PartitionBy
    from shardemb.exports.selection import Query, RowSet, RowSource
    from shardemb.exports.targets import ExportReport


@dataclass(frozen=True)
class Job:
    """What is to be written where.

    Attributes
    ----------
    source : RowSource
    path : path-like or str
        Not checked yet.
    rows : RowSet
    columns : sequence of str
        State columns; empty for formats that have none.
    resume : bool
        Whether to continue an interrupted export; False for formats that cannot.
    progress : bool or callable, optional
    """

    source: RowSource
    path: object
    rows: RowSet
    columns: Sequence[str]
    resume: bool
    progress: Progress


@dataclass(frozen=True)
class Format(ABC):
    """What every format has.

    Attributes
    ----------
    name : str
        As `Table.export` and the command line take it.
    suffixes : tuple of str
        Suffixes of files for which the format is taken if none is named.
    has_columns, has_parts, has_urls : bool
        Whether state columns can be exported with the vectors; whether there are parts that an export can be continued
        with; whether the target may be a URL.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    has_columns: ClassVar[bool] = False
    has_parts: ClassVar[bool] = False
    has_urls: ClassVar[bool] = False

    @abstractmethod
    def write(self, job: Job) -> ExportReport:
        """Write the rows of a job."""


@dataclass(frozen=True)
class Parquet(Format):
    """Parquet files; see `Table.export_parquet` for what is in them.

    Parameters
    ----------
    parts : int, optional
        Write a folder with this many files of about equal size, ``part-00000.parquet`` and so on, several at a time.
    encoding : {"plain", "byte_stream_split"}
        How values are stored. Every reader knows ``"plain"``; the other makes files about a tenth smaller.
    partition_by : {"shard", ("hash", n)}, optional
        Write a folder of folders, as Hive names them: ``shard=0/part-00000.parquet`` for each row-shard; or
        ``bucket=0/part-00000.parquet`` and so on, n of them, by a hash of the key, or of the row id in a table without
        keys. The hash is FNV-1a of 64 bits, of the bytes of the string or the 8 bytes of the little-endian integer; the
        bucket is its remainder by n, from 1 to 1,000.

    Examples
    --------
    >>> from shardemb import exports
    >>> exports.Parquet(partition_by=("hash", 16))
    Parquet(parts=None, encoding='plain', partition_by=('hash', 16))
    """

    name: ClassVar[str] = "parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)
    has_columns: ClassVar[bool] = True
    has_parts: ClassVar[bool] = True
    has_urls: ClassVar[bool] = True

    parts: int | None = None
    encoding: Encoding = "plain"
    partition_by: PartitionBy = None

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import parquet

        layout = parquet.Layout(self.parts, self.partition_by, job.resume, self.encoding)
        layout.check(job.source.name)
        return parquet.write_parquet(
            job.source, job.path, job.rows, layout, columns=job.columns, progress=job.progress
        )


@dataclass(frozen=True)
class Arrow(Format):
    """An Arrow IPC file, which is also Feather's second version; with the columns of `Table.to_arrow_batches`."""

    name: ClassVar[str] = "arrow"
    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather")
    has_columns: ClassVar[bool] = True

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import arrow

        return arrow.export_arrow(job.source, job.path, job.rows, columns=job.columns, progress=job.progress)


@dataclass(frozen=True)
class Word2VecText(Format):
    """word2vec's text format: a line with the numbers of rows and of values, then a line of token and values each.

    Tokens are the keys of the table, or the row ids where there are none. Each number is the shortest decimal that
    reads back as the same float32. A key that is empty or has a blank or a line break is refused.
    """

    name: ClassVar[str] = "word2vec-text"
    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".vec")

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import words

        return words.export_text(job.source, job.path, job.rows, progress=job.progress)


@dataclass(frozen=True)
class Word2VecBinary(Format):
    """word2vec's binary format, as gensim writes it: no line break after a row. Tokens are as for `Word2VecText`."""

    name: ClassVar[str] = "word2vec-binary"
    suffixes: ClassVar[tuple[str, ...]] = (".bin",)

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import words

        return words.export_binary(job.source, job.path, job.rows, progress=job.progress)


@dataclass(frozen=True)
class Npy(Format):
    """NumPy's .npy file, which can be mapped; its rows are in the order of the row ids.

    float16 if the table stores that, uint8 if it holds raw bytes, else float32. The keys of ``NAME.npy`` are in
    ``NAME.tokens.txt``, one a line, in the order of its rows; a key with a line break is refused.
    """

    name: ClassVar[str] = "npy"
    suffixes: ClassVar[tuple[str, ...]] = (".npy",)

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import arrays

        return arrays.export_npy(job.source, job.path, job.rows, progress=job.progress)


@dataclass(frozen=True)
class Safetensors(Format):
    """A safetensors file with one tensor, whose data begin at a multiple of 4,096 bytes, so that it can be mapped.

    The tensor has the table's dtype: F32, F16, BF16, F8_E4M3 or F8_E5M2, and U8 for raw bytes; tables of scaled bytes
    become F32. Keys are written as for `Npy`.

    Parameters
    ----------
    tensor : str
        Name of the tensor.
    max_bytes : int
        Most bytes of vectors in a file. ``NAME.safetensors`` with more becomes ``NAME-00001-of-00002.safetensors`` and
        so on, with tensors ``embedding.0``, ``embedding.1``; ``NAME.safetensors.index.json`` says which tensor is
        where.
    """

    name: ClassVar[str] = "safetensors"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)

    tensor: str = "embedding"
    max_bytes: int = 5_000_000_000

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import arrays

        return arrays.export_safetensors(
            job.source, job.path, job.rows, name=self.tensor, most_bytes=self.max_bytes, progress=job.progress
        )


@dataclass(frozen=True)
class Lance(Format):
    """A Lance dataset, written by the package pylance; with the columns of `Table.to_arrow_batches`."""

    name: ClassVar[str] = "lance"
    suffixes: ClassVar[tuple[str, ...]] = (".lance",)

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import lance

        return lance.export_lance(job.source, job.path, job.rows, progress=job.progress)


@dataclass(frozen=True)
class Projector(Format):
    """A folder for TensorBoard's embedding projector, and for the stand-alone page; of a sample of the rows.

    Parameters
    ----------
    sample : int or array_like
        How many rows; or row ids, or keys where the table has some.
    by : {"random", "count"}
        How a number of rows is chosen: by chance, or those that were updated most often, in a table with counters.
    seed : int
        The same seed chooses the same rows.
    """

    name: ClassVar[str] = "projector"

    sample: Any = 10_000
    by: Literal["random", "count"] = "random"
    seed: int = 0

    def write(self, job: Job) -> ExportReport:
        """See `Format`."""
        from shardemb.exports import projector

        sample = projector.Sample(self.sample, self.by, self.seed)
        return projector.export_projector(job.source, job.path, job.rows, sample, progress=job.progress)


FORMATS: dict[str, type[Format]] = {
    each.name: each
    for each in (Parquet, Arrow, Word2VecText, Word2VecBinary, Npy, Safetensors, Lance, Projector)
}


def export(
    source: RowSource,
    path: object,
    format: str | Format | None,
    query: Query,
    *,
    columns: Sequence[str] = (),
    resume: bool = False,
    progress: Progress = None,
) -> ExportReport:
    """Write rows in some format; see `Table.export`."""
    chosen = format_of(path, format, f"table {source.name!r}: ")
    what = f"table {source.name!r}: the format {chosen.name!r}"
    if columns and not chosen.has_columns:
        msg = f"{what} has vectors alone, no columns like {columns!r:.80}: parquet and arrow have them"
        raise ValueError(msg)
    if resume and not chosen.has_parts:
        msg = (
            f"{what} has no parts with which an export could be continued: pass resume=True to parquet alone"
        )
        raise ValueError(msg)
    if _is_url(path):
        path = _local(str(path))
        if _is_url(path) and not chosen.has_urls:
            msg = f"{what} is written to local disks alone, got {path!r}: export there and copy it, or choose parquet"
            raise ValueError(msg)
    job = Job(source, path, query.of(source), columns, resume, progress)
    if query.removed is None:
        return chosen.write(job)
    from shardemb.exports import parquet

    with parquet.removed_keys(source.name, path, chosen.suffixes, query.removed) as removed_path:
        report = chosen.write(job)
    return replace(report, removed_path=removed_path, num_removed=len(query.removed))


def format_of(path: object, given: str | Format | None = None, what: str = "") -> Format:
    """Return the format that was given, by its name or as an object, or else that of the suffix.

    Parameters
    ----------
    path : path-like or str
        Where the export goes.
    given : str or Format, optional
    what : str
        What messages begin with.

    Raises
    ------
    ValueError
        There is no such format, or the suffix stands for none.

    Examples
    --------
    >>> from shardemb import exports
    >>> exports.format_of("words.vec")
    Word2VecText()
    """
    if isinstance(given, Format):
        return given
    if isinstance(given, str) and given in FORMATS:
        return FORMATS[given]()
    known = ", ".join(map(repr, FORMATS))
    if given is not None:
        msg = f"{what}format must be one of {known}, or an object of shardemb.exports; got {given!r:.80}"
        raise ValueError(msg)
    suffix = PurePath(urlsplit(str(path)).path if _is_url(path) else str(path)).suffix.lower()
    by_suffix = {each: kind for kind in FORMATS.values() for each in kind.suffixes}
    if suffix not in by_suffix:
        msg = (
            f"{what}the name {str(path)!r:.100} does not tell the format, as {', '.join(by_suffix)} do: pass format, "
            f"one of {known}"
        )
        raise ValueError(msg)
    return by_suffix[suffix]()


def _is_url(path: object) -> bool:
    return isinstance(path, str) and "://" in path


def _local(url: str) -> str:
    """Return the path of a ``file://`` URL; other URLs as they are."""
    from shardemb.exports import remote

    return remote.local_part(url) or url
