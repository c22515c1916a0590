"""Words and vectors as text, the formats of word2vec, fastText (.vec) and GloVe: a line for each row.

A line is a token, a blank and the numbers, with a blank between them. word2vec and fastText begin with a line that says
how many rows and numbers there are; GloVe does not.

1. The stream is cut behind the last newline of each `CHUNK` bytes.
2. pyarrow's CSV reader parses the lines of a chunk on all cores, each number to the nearest float32. It knows nothing
   of what real files have beside that: tokens with blanks or carriage returns in them.
3. A chunk that it refuses is halved, until a few lines are left, which Python reads one by one, or refuses by number.
"""

from __future__ import annotations

import os
import re
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from shardemb.base.formatting import plural
from shardemb.imports import streams
from shardemb.imports.blocks import MAX_DIM, Block, block_rows, refuse, refuse_unused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from shardemb.base.validation import Float32Array
    from shardemb.imports.blocks import ReadOptions, UnicodeErrors, VectorSource

CHUNK = 4 * 2**20
"""Bytes that are parsed at once."""

LINE_BYTES = 16 * 2**20
"""A longer line is no line of text: a bound of memory."""

_KEY_BYTES = 16 * 2**20
"""Bytes of keys after which a block ends, however few values it has."""

_FEW = 64
"""Lines that are read one by one rather than halved again."""

_MARK = b"\xef\xbb\xbf"
"""A byte order mark in UTF-8, which some editors write at the beginning of a file; anywhere else, it is a character."""

_NUMBER = re.compile(rb"[+-]?(\d+(?:\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_LIKE_NUMBER = re.compile(_NUMBER.pattern + rb"|[+-]?(nan|inf(inity)?)", re.IGNORECASE)
_HEADER = re.compile(rb"[ \t]*(\d{1,19})[ \t]+(\d{1,19})[ \t\r]*(?:\n|\Z)")


# ---- what all files of words have -------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Some rows, as a format's parser has them; see `Block`, but `consumed` is what was read so far."""

    rows: Float32Array
    keys: Any
    consumed: int


class FileVectors(ABC):
    """A source of vectors in a file; see `VectorSource`. Each format says how its `pieces` are read."""

    dtype = "float32"
    key_type: Literal["string", "int64"] | None = "string"
    unit: Literal["row", "byte"] = "byte"

    def __init__(self, stream: streams.Stream, form: str, dim: int, num_rows: int | None) -> None:
        self.format, self.name, self.dim, self.num_rows = form, stream.name, dim, num_rows
        self.total = stream.size
        self._stream = stream

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Read the rows in pieces of any size."""

    def blocks(self) -> Iterator[Block]:
        """Read the rows, once, in order; see `VectorSource.blocks`."""
        first, consumed, held = 0, 0, list[Piece]()
        for piece in self.pieces():
            held.append(piece)
            rows = sum(len(each.rows) for each in held)
            key_bytes = sum(each.keys.nbytes for each in held) if self.key_type else 0
            if rows >= block_rows(self.dim) or key_bytes >= _KEY_BYTES:
                yield _joined(held, first, piece.consumed - consumed)
                first, consumed, held = first + rows, piece.consumed, []
        if held:
            yield _joined(held, first, held[-1].consumed - consumed)

    def key_blocks(self) -> None:
        """There is no way to the keys but through the rows."""
        return None  # noqa: RET501 -- and nothing to override

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _joined(pieces: list[Piece], first: int, consumed: int) -> Block:
    rows = pieces[0].rows if len(pieces) == 1 else np.concatenate([each.rows for each in pieces])
    keys = None if pieces[0].keys is None else pa.concat_arrays([each.keys for each in pieces])
    return Block(rows, keys, first, consumed)


def read_header(stream: streams.Stream) -> tuple[int, int]:
    """Read the first line of a file of word2vec: how many rows it has, and how many numbers each.

    Raises
    ------
    SourceError
        There is no such line, or it says what no table can be.
    """
    begin = stream.peek(100)
    if not begin:
        raise refuse(stream.name, "", "is empty")
    found = _HEADER.match(begin)
    if not found:
        problem = "and not with how many rows and values there are; is the format another one, such as glove?"
        raise refuse(stream.name, "line 1", f"begins with {shown(begin.splitlines()[0])}, {problem}")
    num_rows, dim = int(found[1]), int(found[2])
    if not 1 <= dim <= MAX_DIM:
        raise refuse(stream.name, "line 1", f"rows of {plural(dim, 'value')}; tables have 1 to {MAX_DIM:,}")
    stream.skip(found.end())
    return num_rows, dim


def require_room(stream: streams.Stream, promised: int, row_bytes: int) -> None:
    """Refuse a number of rows that a file is too small for, if it is not compressed.

    Parameters
    ----------
    promised : int
        How many rows begin at the stream's position, as a header says.
    row_bytes : int
        Bytes that a row has at least.

    Raises
    ------
    SourceError
        These are more than the file has.
    """
    left = stream.size - stream.position
    if not stream.compression and promised * row_bytes > left + 1:  # the last newline may be missing
        problem = (
            f"promises {plural(promised, 'row')} of at least {row_bytes:,} bytes, but {left:,} bytes follow"
        )
        raise refuse(stream.name, "line 1", f"{problem}: the file is cut off, or has another format")


def strings(tokens: pa.Array, name: str, place: Callable[[int], str], errors: UnicodeErrors) -> pa.Array:
    """Decode tokens.

    Parameters
    ----------
    tokens : pyarrow.BinaryArray
    name, place : str and callable
        For messages: the source, and ``place(number of the token)``.
    errors : {"strict", "replace", "ignore"}
        What becomes of tokens that are not UTF-8.

    Returns
    -------
    pyarrow.StringArray

    Raises
    ------
    SourceError
        `errors` is ``"strict"``, and a token is not UTF-8.
    """
    try:
        return tokens.cast(pa.string())
    except pa.ArrowInvalid:
        pass
    decoded = []
    for number, token in enumerate(tokens.to_pylist()):
        try:
            decoded.append(token.decode("utf-8", errors))
        except UnicodeDecodeError as error:
            problem = f"the token {shown(token)} is not UTF-8"
            way_out = "unicode_errors='replace' or 'ignore' reads it all the same"
            raise refuse(name, place(number), f"{problem}; {way_out}") from error
    return pa.array(decoded, pa.string())


def require_finite(rows: Float32Array, name: str, place: Callable[[int], str]) -> None:
    """Refuse rows with values that no vector has.

    Raises
    ------
    SourceError
        A value is NaN or infinite. It names the first one.
    """
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.unravel_index(int(finite.argmin()), rows.shape)
        raise refuse(name, place(int(row)), f"value {column + 1} is {rows[row, column]}, and not finite")


def first_of(num_rows: int, limit: int | None) -> int:
    """Return how many of some rows are read."""
    return num_rows if limit is None else min(num_rows, limit)


def shown(data: bytes) -> str:
    """Show the beginning of what was found."""
    return f"{data[:60]!r:.120}{'...' if len(data) > 60 else ''}"


# ---- text -------------------------------------------------------------------------------------------------------


class TextVectors(FileVectors):
    """An open file of words and vectors as text.

    Parameters
    ----------
    lines : int
        Lines before those of the rows.
    promised : int or None
        How many rows a header says there are. More are ignored, fewer are an error.
    """

    def __init__(
        self,
        stream: streams.Stream,
        form: str,
        dim: int,
        lines: int,
        promised: int | None,
        options: ReadOptions,
    ) -> None:
        self._lines, self._promised, self._errors = lines, promised, options.unicode_errors
        self._wanted = first_of(sys.maxsize if promised is None else promised, options.limit)
        known = promised is not None and not stream.compression
        super().__init__(stream, form, dim, self._wanted if known else None)
        columns = [str(number) for number in range(dim + 1)]
        self._read = csv.ReadOptions(column_names=columns, block_size=max(2**20, 64 * dim))
        self._layout = csv.ParseOptions(
            delimiter=" ", quote_char=False, double_quote=False, escape_char=False, ignore_empty_lines=False
        )
        types = dict.fromkeys(columns[1:], pa.float32()) | {"0": pa.binary()}
        self._types = csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False)

    def pieces(self) -> Iterator[Piece]:
        """Read the rows, as many as are in a chunk."""
        row = 0
        while row < self._wanted and (text := self._chunk(row)):
            text = _first_lines(text, self._wanted - row)
            rows, tokens = self._parsed(text, row)
            require_finite(rows, self.name, self._placed(row))
            keys = strings(tokens, self.name, self._placed(row), self._errors)
            row += len(rows)
            yield Piece(rows, keys, self._stream.consumed)
        if self._promised is not None and row < self._wanted:
            problem = f"the file ends after {plural(row, 'row')}, but line 1 promises {self._promised:,}"
            raise refuse(self.name, f"line {self._lines + row + 1:,}", f"{problem}: it is cut off")

    def _placed(self, first: int) -> Callable[[int], str]:
        """Return what tells where a row is, by its number after row `first`."""
        return lambda row: f"line {self._lines + first + row + 1:,} (row {first + row:,})"

    def _chunk(self, row: int) -> bytes:
        """Take the next lines, each with its newline; none of them at the end, where empty lines do not count."""
        nbytes = CHUNK
        while True:
            data = self._stream.peek(nbytes)
            if len(data) < nbytes:  # the end
                self._stream.skip(len(data))
                text = data.rstrip(b"\r\n ")
                return text + b"\n" if text else b""
            # Empty lines wait for what comes next, which may be the end.
            text = data[: data.rfind(b"\n") + 1].rstrip(b"\r\n")
            if text:
                text = data[: data.index(b"\n", len(text)) + 1]
                self._stream.skip(len(text))
                return text
            if nbytes >= LINE_BYTES:
                problem = f"no row ends within {nbytes:,} bytes: this is no text of words and vectors"
                raise refuse(self.name, self._placed(row)(0), problem)
            nbytes = LINE_BYTES

    def _parsed(self, text: bytes, first: int) -> tuple[Float32Array, pa.Array]:
        """Parse lines, of which the first has row `first`; return rows and tokens."""
        # The tools of word2vec and fastText write a blank at the end of a row: if at that of one, then at that of all.
        if text[: text.index(b"\n")].endswith((b" ", b"\r")):
            text = text.replace(b"\r\n", b"\n").replace(b" \n", b"\n")
        if (parsed := self._all_at_once(text)) is not None:
            return parsed
        if text.count(b"\n") <= _FEW:
            return self._one_by_one(text, first)
        middle = text.rfind(b"\n", 0, len(text) // 2) + 1 or text.index(b"\n") + 1
        one, other = text[:middle], text[middle:]
        halves = self._parsed(one, first), self._parsed(other, first + one.count(b"\n"))
        rows, tokens = zip(*halves, strict=True)
        return np.concatenate(rows), pa.concat_arrays(tokens)

    def _all_at_once(self, text: bytes) -> tuple[Float32Array, pa.Array] | None:
        """Parse lines that are as they should be; None if one may not be."""
        # Within a line, a carriage return ends it for pyarrow; and it leaves out a byte order mark, here a token's.
        if b"\r" in text or text.startswith(_MARK):
            return None
        try:
            table = csv.read_csv(pa.BufferReader(text), self._read, self._layout, self._types)
        except pa.ArrowInvalid:
            return None
        rows, start = np.empty((table.num_rows, self.dim), np.float32), 0
        for batch in table.to_batches():
            part = rows[start : start + batch.num_rows]
            for column in range(self.dim):
                part[:, column] = batch.column(column + 1).to_numpy()
            start += batch.num_rows
        return rows, table.column(0).combine_chunks()

    def _one_by_one(self, text: bytes, first: int) -> tuple[Float32Array, pa.Array]:
        tokens, rows = [], np.empty((text.count(b"\n"), self.dim), np.float32)
        for number, line in enumerate(text.removesuffix(b"\n").split(b"\n")):
            try:
                token, rows[number] = self._row(line.rstrip(b" \r"))
            except ValueError as error:
                raise refuse(self.name, self._placed(first)(number), f"{error}: {shown(line)}") from error
            tokens.append(token)
        return rows, pa.array(tokens, pa.binary())

    def _row(self, line: bytes) -> tuple[bytes, Float32Array]:
        """Return the token of a line and its values; raises ValueError if it has too few or too many."""
        token, *fields = line.rsplit(b" ", self.dim)
        if len(fields) < self.dim:
            found = f"a token and {plural(len(fields), 'number')}" if line else "the line is empty"
            msg = f"{found}, but rows have {plural(self.dim, 'number')}"
            raise ValueError(msg)
        values = _values(fields)
        # Blanks in tokens are fine, but this is what a row with more numbers looks like.
        _, blank, last = token.rpartition(b" ")
        if blank and _NUMBER.fullmatch(last):
            is_header = self.dim == 1 and self._lines == 0
            hint = " (is line 1 a header, and the format word2vec-text?)" if is_header else ""
            msg = f"more than {plural(self.dim, 'number')}{hint}"
            raise ValueError(msg)
        return token, values


def _first_lines(text: bytes, count: int) -> bytes:
    if count >= len(text):
        return text
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))
    return text if len(ends) <= count else text[: int(ends[count - 1]) + 1]


def _values(fields: list[bytes]) -> Float32Array:
    """Return the float32 nearest to each number; raises ValueError for what is none."""
    try:
        found: Float32Array = pa.array(fields, pa.binary()).cast(pa.string()).cast(pa.float32()).to_numpy()
        return found
    except pa.ArrowInvalid as error:
        if len(fields) > 1:
            return np.concatenate([_values([field]) for field in fields])
        msg = f"{shown(fields[0])} is not a number"
        raise ValueError(msg) from error


def _beginning(stream: streams.Stream) -> bytes:
    """Return the first line, without passing over it; refuse what is not text in UTF-8."""
    streams.refuse_packed(stream)
    if stream.peek(len(_MARK)) == _MARK:
        stream.skip(len(_MARK))
    if stream.peek(2) in (b"\xff\xfe", b"\xfe\xff"):
        raise refuse(stream.name, "", "is in UTF-16: convert it first, iconv -f UTF-16 -t UTF-8")
    nbytes = 2**16
    while b"\n" not in (begin := stream.peek(nbytes)) and len(begin) == nbytes < LINE_BYTES:
        nbytes *= 2
    return begin[: begin.find(b"\n") + 1] or begin


def read_tokens(given: object, errors: UnicodeErrors) -> Iterator[Any]:
    r"""Read keys for rows that have none.

    Parameters
    ----------
    given : path-like or sequence
        A text file with one token a line, also compressed, or the keys themselves.
    errors : {"strict", "replace", "ignore"}
        What becomes of tokens that are not UTF-8.

    Yields
    ------
    pyarrow.StringArray, or what was given

    Raises
    ------
    SourceError
        A token is not UTF-8, or a line is endless.

    Examples
    --------
    >>> path = tmp / "tokens.txt"
    >>> _ = path.write_bytes(b"the\nof\n")
    >>> [each.to_pylist() for each in read_tokens(path, "strict")]
    [['the', 'of']]
    """
    if not isinstance(given, str | os.PathLike):
        yield given
        return
    with streams.open_stream(given) as stream:
        streams.refuse_packed(stream)
        first = 0
        while data := stream.peek(CHUNK):
            end = data.rfind(b"\n") + 1 if len(data) == CHUNK else len(data)
            if not end:
                raise refuse(
                    stream.name, f"line {first + 1:,}", f"has more than {CHUNK:,} bytes: this is no token"
                )
            stream.skip(end)
            lines = [line.removesuffix(b"\r") for line in data[:end].removesuffix(b"\n").split(b"\n")]
            yield strings(pa.array(lines, pa.binary()), stream.name, _line_after(first), errors)
            first += len(lines)


def _line_after(first: int) -> Callable[[int], str]:
    return lambda number: f"line {first + number + 1:,}"


def _with_header(source: object, form: str, options: ReadOptions) -> VectorSource:
    with streams.opening(source) as stream:
        refuse_unused(stream.name, options, "unicode_errors")
        _beginning(stream)
        promised, dim = read_header(stream)
        require_room(stream, promised, 2 * dim + 1)
        return TextVectors(stream, form, dim, 1, promised, options)


def open_word2vec_text(source: object, options: ReadOptions) -> VectorSource:
    r"""Open a file of word2vec as text: a line with the numbers of rows and of values, then the rows.

    Parameters
    ----------
    source : str or path-like
        A local file, also compressed; see `open_stream`.
    options : ReadOptions
        `limit` and `unicode_errors`.

    Returns
    -------
    VectorSource
        With a string for each row; tokens that occur twice are there twice. Tokens may have anything in them but a
        newline. They may even have blanks, but then what follows the last one is no number. Rows beyond those that
        the first line promises are not read.

    Raises
    ------
    SourceError
        There is no such first line; or, by `VectorSource.blocks`, a line is not a token and its numbers.
    OSError, TypeError, ValueError
        See `open_stream`.

    Examples
    --------
    >>> from shardemb.imports.blocks import ReadOptions
    >>> path = tmp / "words.vec"
    >>> _ = path.write_text("2 3\nthe 0.1 0.2 0.3\nof 1 2 3\n")
    >>> with open_word2vec_text(path, ReadOptions()) as words:
    ...     block, = words.blocks()
    >>> block.keys.to_pylist(), block.rows[1], words.num_rows
    (['the', 'of'], array([1., 2., 3.], dtype=float32), 2)
    """
    return _with_header(source, "word2vec-text", options)


def open_fasttext_text(source: object, options: ReadOptions) -> VectorSource:
    """Open a .vec file of fastText, which is a file of word2vec; see `open_word2vec_text`."""
    return _with_header(source, "fasttext-text", options)


def open_glove(source: object, options: ReadOptions) -> VectorSource:
    """Open a file of GloVe: rows as in `open_word2vec_text`, and no line before them.

    The first row says how many numbers each has. How many rows there are is known only at the end.
    """
    with streams.opening(source) as stream:
        refuse_unused(stream.name, options, "unicode_errors")
        line = _beginning(stream)
        if not line.strip(b"\r\n "):
            raise refuse(stream.name, "line 1", "there is no row" if line else "the file is empty")
        fields = line.rstrip(b"\r\n ").split(b" ")
        dim = 0
        while dim < len(fields) - 1 and _LIKE_NUMBER.fullmatch(fields[-1 - dim]):
            dim += 1
        if not 1 <= dim <= MAX_DIM:
            problem = (
                f"{plural(dim, 'number')} after a token" if dim else "no number after a token and a blank"
            )
            raise refuse(stream.name, "line 1", f"{problem}; rows have 1 to {MAX_DIM:,}: {shown(line)}")
        return TextVectors(stream, "glove", dim, 0, None, options)
