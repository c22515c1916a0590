"""Files of the caller's, opened to read, and decompressed where their first bytes say so.

A stream is read by looking ahead: ``peek`` shows what comes next, ``skip`` passes over what was understood. So a parser
takes as much as it can from a large piece, and what is cut off at the end of the piece is at the beginning of the next
one. Memory is bounded by what is peeked at, whatever a file expands to.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from shardemb.base.paths import local_path
from shardemb.imports.blocks import refuse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

_CODECS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
"""How files begin that are decompressed on the way; the names are those of pyarrow."""

_PACKED = (
    (rb"PK(\x03\x04|\x05\x06)", "a zip archive", "unzip it first, and pass the file that is in it"),
    (rb"\xfd7zXZ\0", "compressed with xz", "decompress it first: xz -d"),
    (rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "compressed with lz4", "decompress it first: lz4 -d"),
    (rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07|LZIP\x01|\x1f[\x9d\xa0]", "an archive", "unpack it first"),
)
"""How files begin that have to be unpacked by other means: pattern, what they are, and the way out."""


class Stream:
    """The bytes of a file in their order, decompressed. For one thread; a context manager, which closes it.

    Attributes
    ----------
    name : str
        The path, for messages.
    size : int
        Bytes of the file on disk.
    compression : {"gzip", "bz2", "zstd"} or None
        As the first bytes tell, whatever the name is.
    position : int
        Number of the next byte, after decompression.
    """

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.name, self.size, self.position = str(path), file.seek(0, io.SEEK_END), 0
        file.seek(0)
        begin = file.read(16)
        file.seek(0)
        self.compression = next((name for name, magic in _CODECS.items() if magic.match(begin)), None)
        self._file, self._ahead, self._start = file, b"", 0
        self._bytes: Any = pa.CompressedInputStream(file, self.compression) if self.compression else file

    @property
    def consumed(self) -> int:
        """How many bytes of the file were needed so far, for progress: `size` at the end."""
        return int(self._file.tell()) if self.compression else self.position

    def peek(self, nbytes: int) -> bytes:
        """Return the next `nbytes` without passing over them; fewer only at the end.

        Raises
        ------
        SourceError
            What is compressed is damaged, or the file ends too early to decompress it.
        """
        missing = nbytes - (len(self._ahead) - self._start)
        if missing > 0:
            self._ahead = b"".join([self._ahead[self._start :], *self._pieces(missing)])
            self._start = 0
        return self._ahead[self._start : self._start + nbytes]

    def _pieces(self, nbytes: int) -> Iterator[bytes]:
        try:
            while nbytes and (piece := self._bytes.read(nbytes)):
                nbytes -= len(piece)
                yield piece
        except (OSError, pa.ArrowInvalid) as error:
            if getattr(error, "errno", None) is not None:  # of the disk, not of pyarrow's decompression
                raise
            problem = (
                f"cannot be decompressed: what is compressed with {self.compression} is damaged or cut off"
            )
            raise refuse(self.name, f"before byte {self._file.tell():,}", f"{problem} ({error})") from error

    def skip(self, nbytes: int) -> None:
        """Pass over `nbytes` that were peeked at."""
        self._start += nbytes
        self.position += nbytes

    def mapped(self) -> memoryview:
        """Map the file, so that any part of it can be read at any time by any thread, and also after `close`.

        Raises
        ------
        SourceError
            It is compressed, so that a part can be read only after all that is before it.
        """
        if self.compression:
            problem = f"is compressed with {self.compression}, but its rows are read in any order: decompress it first"
            raise refuse(self.name, "", problem)
        if self.size == 0:
            return memoryview(b"")
        # By its descriptor: the file at the path may be another one by now.
        with pa.memory_map(f"/proc/self/fd/{self._file.fileno()}") as file:
            return memoryview(file.read_buffer(self.size)).cast("B")

    def close(self) -> None:
        """Close the file."""
        self._ahead, self._start = b"", 0
        self._bytes.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_stream(source: object) -> Stream:
    """Open a file to read.

    Parameters
    ----------
    source : str or path-like
        A local file, as it is or compressed with gzip, bzip2 or zstd.

    Raises
    ------
    TypeError, ValueError
        No path of this machine; see `local_path`.
    SourceError
        A folder, a pipe or a device.
    OSError
        The file is not there, or may not be read.

    Examples
    --------
    >>> import gzip
    >>> path = tmp / "words.txt"  # whatever its name is
    >>> _ = path.write_bytes(gzip.compress(b"a 1 2"))
    >>> with open_stream(path) as stream:
    ...     stream.skip(len(stream.peek(2)))
    ...     stream.peek(100), stream.position, stream.compression
    (b'1 2', 2, 'gzip')
    """
    path = local_path(source, "a file to import")
    if not stat.S_ISREG(
        path.stat().st_mode
    ):  # before it is opened: that of a pipe would wait for its other end
        problem = "is a folder" if path.is_dir() else "is no regular file, but a pipe, a socket or a device"
        raise refuse(str(path), "", f"{problem}; pass the path of a file")
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    try:
        return Stream(path, file)
    except BaseException:
        file.close()
        raise


@contextlib.contextmanager
def opening(source: object) -> Iterator[Stream]:
    """Open a file for what is made of it in a with block, which closes it later; closed here if the block raises."""
    stream = open_stream(source)
    try:
        yield stream
    except BaseException:
        stream.close()
        raise


def refuse_packed(stream: Stream) -> None:
    """Refuse a file that has to be unpacked by other means before there is anything to read in it.

    Raises
    ------
    SourceError
        A zip archive, or compressed with xz, for example.
    """
    begin = stream.peek(16)
    for magic, what, way_out in _PACKED:
        if re.match(magic, begin):
            raise refuse(stream.name, "", f"is {what}, which is not read here: {way_out}")
