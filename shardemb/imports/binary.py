"""Words and vectors as bytes: the binary format of word2vec, and models of fastText (.bin).

A file of word2vec is read from its beginning to its end. A model of fastText is mapped: the vector of a word is the
mean of rows from all over its matrix, those of the word and of its n-grams.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from shardemb.base.formatting import plural
from shardemb.compute.compiler import kernel
from shardemb.imports import streams
from shardemb.imports.blocks import MAX_DIM, block_rows, refuse, refuse_unused
from shardemb.imports.text import (
    FileVectors,
    Piece,
    first_of,
    read_header,
    require_finite,
    require_room,
    strings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.imports.blocks import ReadOptions, VectorSource

CHUNK = 4 * 2**20
"""Bytes of rows that are parsed at once."""

TOKEN_BYTES = 2**16
"""A longer token is none: where there is no end of one, the file has another format."""

_BLANK, _NEWLINE = ord(" "), ord("\n")


# ---- word2vec ---------------------------------------------------------------------------------------------------


class BinaryVectors(FileVectors):
    """An open file of word2vec, binary."""

    def __init__(self, stream: streams.Stream, dim: int, promised: int, options: ReadOptions) -> None:
        self._promised, self._errors = promised, options.unicode_errors
        self._wanted = first_of(promised, options.limit)
        super().__init__(stream, "word2vec-binary", dim, None if stream.compression else self._wanted)

    def pieces(self) -> Iterator[Piece]:
        """Read the rows, as many as are in a chunk."""
        row = 0
        while row < self._wanted:
            data = self._stream.peek(CHUNK)
            found = rows_in(data, 4 * self.dim, self._wanted - row)
            if not len(found.tokens):
                raise self._stuck(data, row)
            place, rows = self._placed(row, found.starts), found.values.view("<f4")
            require_finite(rows, self.name, place)
            keys = strings(found.tokens, self.name, place, self._errors)
            self._stream.skip(found.end)
            row += len(rows)
            yield Piece(rows, keys, self._stream.consumed)

    def _placed(self, first: int, starts: Int64Array) -> Callable[[int], str]:
        position = self._stream.position
        return lambda row: f"byte {position + starts[row]:,} (row {first + row:,})"

    def _stuck(self, data: bytes, row: int) -> Exception:
        place = f"byte {self._stream.position:,} (row {row:,})"
        if len(data) >= TOKEN_BYTES and b" " not in data[:TOKEN_BYTES]:
            problem = f"no blank within {TOKEN_BYTES:,} bytes, so this is no token; are the values float32?"
            return refuse(self.name, place, problem)
        promise = f"line 1 promises {plural(self._promised, 'row')}"
        return refuse(self.name, place, f"the file ends within a row, but {promise}: it is cut off")


class Found(NamedTuple):
    """Rows of a token, a blank and values, as they were found in some bytes.

    Attributes
    ----------
    tokens : pyarrow.BinaryArray
    starts : ndarray of int64
        Where the values of each row begin.
    values : ndarray of uint8, shape (number of rows, bytes of values)
    end : int
        Where the last row ends.
    """

    tokens: pa.Array
    starts: Int64Array
    values: NDArray[np.uint8]
    end: int


def rows_in(data: bytes, nbytes: int, count: int) -> Found:
    """Find at most `count` rows with `nbytes` of values each."""
    most = min(count, len(data) // (nbytes + 1))
    starts, bounds = np.empty(most, np.int64), np.zeros(most + 1, np.int32)
    text, values = np.empty(len(data), np.uint8), np.empty((most, nbytes), np.uint8)
    some = find_rows(np.frombuffer(data, np.uint8), TOKEN_BYTES, starts, bounds, text, values)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(text)]
    tokens = pa.Array.from_buffers(pa.binary(), some, buffers)
    return Found(tokens, starts[:some], values[:some], int(starts[some - 1]) + nbytes if some else 0)


@kernel
def find_rows(
    data: NDArray[np.uint8],
    longest: int,
    starts: Int64Array,
    bounds: NDArray[np.int32],
    text: NDArray[np.uint8],
    values: NDArray[np.uint8],
) -> int:
    """Copy tokens and values out of rows that follow each other, until the data or the results end.

    Parameters
    ----------
    data : ndarray of uint8
    longest : int
        A token has fewer bytes.
    starts : ndarray of int64, shape (n,)
        Becomes where the values of each row begin.
    bounds : ndarray of int32, shape (n + 1,)
        Becomes where tokens begin and end in `text`. The first number is 0.
    text : ndarray of uint8
        Becomes the tokens, one after the other.
    values : ndarray of uint8, shape (n, bytes of values)

    Returns
    -------
    int
        How many rows there are.
    """
    nbytes, at, filled = values.shape[1], 0, 0
    for row in range(len(values)):
        # A blank too late to have all values behind it is none.
        last = min(at + longest, data.size - nbytes)
        blank = at
        while blank < last and data[blank] != _BLANK:
            blank += 1
        if blank >= last:
            return row
        # The tool of word2vec writes a newline behind each row, gensim does not.
        while data[at] == _NEWLINE:
            at += 1
        text[filled : filled + blank - at] = data[at:blank]
        filled += blank - at
        values[row] = data[blank + 1 : blank + 1 + nbytes]
        starts[row], bounds[row + 1], at = blank + 1, filled, blank + 1 + nbytes
    return len(values)


def _is_text(stream: streams.Stream, dim: int) -> bool:
    """Return whether the first row has digits where its values should be."""
    found = re.match(rb"[^ ]* (-?[\d.e-]+ [\d.e \n-]*)", stream.peek(TOKEN_BYTES))
    return dim > 1 and found is not None and len(found[1]) >= min(4 * dim, 1000)


def _is_double(begin: bytes, dim: int, num_rows: int) -> bool:
    """Return whether the first rows make sense only if their values are float64."""
    count = min(num_rows, 16)
    found = rows_in(begin, 8 * dim, count)
    ends_there = len(found.tokens) == num_rows and not begin[found.end :].strip(b"\n")
    return _are_words(found.tokens) and (ends_there or not _are_words(rows_in(begin, 4 * dim, count).tokens))


def _are_words(tokens: pa.Array) -> bool:
    try:
        return len(tokens) > 0 and all(token.decode().isprintable() for token in tokens.to_pylist())
    except UnicodeDecodeError:
        return False


def open_word2vec_binary(source: object, options: ReadOptions) -> VectorSource:
    r"""Open a binary file of word2vec: a line with the numbers of rows and of values, then tokens and float32.

    Parameters
    ----------
    source : str or path-like
        A local file, also compressed; see `streams.open_stream`.
    options : ReadOptions
        `limit` and `unicode_errors`.

    Returns
    -------
    VectorSource
        With a string for each row; tokens that occur twice are there twice. Rows beyond those that the first line
        promises are not read.

    Raises
    ------
    SourceError
        There is no such first line, it promises more than the file has, or values are float64, as far as the size of
        the file and its first rows tell; or, by `VectorSource.blocks`, what follows is no row.
    OSError, TypeError, ValueError
        See `streams.open_stream`.

    Examples
    --------
    >>> from shardemb.imports.blocks import ReadOptions
    >>> path = tmp / "words.bin"
    >>> _ = path.write_bytes(b"1 2\nthe " + np.array([0.5, 2], "<f4").tobytes() + b"\n")
    >>> with open_word2vec_binary(path, ReadOptions()) as words:
    ...     block, = words.blocks()
    >>> block.keys.to_pylist(), block.rows
    (['the'], array([[0.5, 2. ]], dtype=float32))
    """
    with streams.opening(source) as stream:
        refuse_unused(stream.name, options, "unicode_errors")
        streams.refuse_packed(stream)
        promised, dim = read_header(stream)
        if _is_text(stream, dim):
            raise refuse(stream.name, "line 2", "the rows are text: the format is word2vec-text")
        fits = stream.size - stream.position >= promised * (8 * dim + 1)
        if not stream.compression and fits and _is_double(stream.peek(CHUNK), dim, promised):
            problem = "values are float64, as programs other than word2vec write them; only float32 is of this format"
            raise refuse(stream.name, f"byte {stream.position:,}", f"{problem}: save the vectors as float32")
        require_room(stream, promised, 4 * dim + 1)
        return BinaryVectors(stream, dim, promised, options)


# ---- fastText ---------------------------------------------------------------------------------------------------

_ARGUMENTS = struct.Struct("<2i12id")
_COUNTS = struct.Struct("<3i2q")
_SHAPE = struct.Struct("<?2q")
_ENTRY_END = 10  # the zero byte behind a word, int64 count, int8 type

MAX_NGRAM = 64
"""Characters of the longest n-grams that are believed; fastText's default is 6."""

_WORDS = 2**16
"""Bytes of the dictionary that are read at once: with all n-grams of its words, some MiB."""

_GATHERED = 8 * 2**20
"""Bytes of rows that are summed at once."""

_MAGIC, _SUPERVISED, _WORD, _END_OF_SENTENCE = 793_712_314, 3, 0, b"</s>"


def _records(data: memoryview, nbytes: int, offset: int, count: int) -> NDArray[Any]:
    """Show memory as records of bytes. They need no alignment, and choosing some of them copies each as a whole."""
    return np.ndarray(count, np.dtype((np.void, nbytes)), data, offset)


def _values(records: NDArray[Any], dim: int) -> Float32Array:
    return records.view("<f4").reshape(-1, dim)


@dataclass(frozen=True)
class Model:
    """What a model of fastText says about itself.

    Attributes
    ----------
    dim : int
        Values in a row.
    buckets : int
        Rows for n-grams, which lie behind those of the words.
    shortest, longest : int
        Characters of n-grams.
    words : int
        Rows for words.
    dictionary, matrix : int
        At which bytes these begin.
    """

    dim: int
    buckets: int
    shortest: int
    longest: int
    words: int
    dictionary: int
    matrix: int


def read_model(view: memoryview, name: str) -> Model:
    """Read all but the rows of a model.

    Parameters
    ----------
    view : memoryview
        The file.
    name : str
        What messages call it.

    Raises
    ------
    SourceError
        It is none, of another version, quantised, or cut off.
    """
    magic, version, dim, *_, kind, buckets, shortest, longest, _, _ = _fields(view, _ARGUMENTS, 0, name)
    if magic != _MAGIC:
        raise refuse(name, "byte 0", "this is no model of fastText, or one from before its version 11")
    if version not in (11, 12):
        raise refuse(name, "byte 4", f"a model of fastText of version {version}; only 11 and 12 are read")
    if version == 11 and kind == _SUPERVISED:
        longest = 0  # as fastText does: they were trained without n-grams of characters
    words, dictionary, end = _dictionary(view, name)
    _, rows, columns = _fields(view, _SHAPE, end, name)
    if not 1 <= dim == columns <= MAX_DIM or rows != words + buckets or buckets < 0:
        counts = f"{words:,} words, {buckets:,} buckets of n-grams and vectors of {dim:,}"
        raise refuse(
            name, f"byte {end:,}", f"a matrix of {rows:,} x {columns:,} for {counts}: the file is damaged"
        )
    if longest > MAX_NGRAM or (longest > 0 and buckets == 0):
        problem = f"n-grams of {longest:,} characters in {plural(buckets, 'bucket')}: the file is damaged"
        raise refuse(name, "byte 0", problem)
    matrix = end + _SHAPE.size
    if matrix + 4 * rows * dim > len(view):
        problem = f"{rows:,} x {columns:,} values should follow, and {len(view) - matrix:,} bytes do"
        raise refuse(name, f"byte {matrix:,}", f"{problem}: the file is cut off")
    return Model(dim, buckets, shortest, longest, words, dictionary, matrix)


def _dictionary(view: memoryview, name: str) -> tuple[int, int, int]:
    """Read over the dictionary: return how many words it has, at which byte they begin, and where it ends."""
    entries, words, labels, _, pruned = _fields(view, _COUNTS, _ARGUMENTS.size, name)
    begin = end = _ARGUMENTS.size + _COUNTS.size
    if min(words, labels) < 0 or entries != words + labels or entries * _ENTRY_END > len(view):
        counts = f"{entries:,} entries, {words:,} words and {labels:,} labels"
        raise refuse(
            name, f"byte {_ARGUMENTS.size}", f"a dictionary of {counts} in a file of {len(view):,} bytes"
        )
    for _, stop in _entries(view, begin, words, labels, name):
        end = stop
    after = end + 8 * max(pruned, 0)
    way_out = "use the model from before it was quantised (.bin), or its vectors (.vec)"
    if after < len(view) and view[after]:
        raise refuse(
            name, f"byte {after:,}", f"the model is quantised (.ftz) and has codes instead of rows; {way_out}"
        )
    if pruned >= 0:
        raise refuse(
            name, f"byte {end:,}", f"n-grams were left out of the model to make it smaller; {way_out}"
        )
    return words, begin, end


def _fields(view: memoryview, layout: struct.Struct, start: int, name: str) -> tuple[Any, ...]:
    if start + layout.size > len(view):
        raise refuse(name, f"byte {len(view):,}", "the file ends before the rows of a model of fastText")
    return layout.unpack_from(view, start)


def _entries(
    view: memoryview, start: int, words: int, labels: int, name: str
) -> Iterator[tuple[list[bytes], int]]:
    """Read the dictionary, which has the words first: yields some words or labels, and where they end."""
    done, total = 0, words + labels
    while done < total:
        data = bytes(view[start : start + _WORDS])
        some, end = list[bytes](), 0
        while done + len(some) < total:
            zero = data.find(b"\0", end)
            if zero < 0 or zero + _ENTRY_END > len(data):
                break
            if (data[zero + _ENTRY_END - 1] == _WORD) != (done + len(some) < words):
                problem = f"entry {done + len(some):,} of the dictionary is not what it should be, a word or a label"
                raise refuse(name, f"byte {start + end:,}", f"{problem}: the file is damaged")
            some.append(data[end:zero])
            end = zero + _ENTRY_END
        if not some:
            raise refuse(
                name, f"byte {start:,}", f"entry {done:,} of the dictionary has no end: the file is damaged"
            )
        done, start = done + len(some), start + end
        yield some, start


def ngram_rows(words: list[bytes], model: Model) -> tuple[Int64Array, Int64Array]:
    """Find the rows of the n-grams of words, as fastText does.

    An n-gram is a run of characters of the word between ``<`` and ``>``. Its row is chosen by its hash, FNV-1a, which
    takes bytes from 128 on as negative numbers.

    Parameters
    ----------
    words : list of bytes
        In UTF-8, or not.
    model : Model
        How long n-grams are, and how many rows there are for them.

    Returns
    -------
    rows : ndarray of int64
        From 0 on, those of one word after those of the other, in their order; twice where an n-gram is there twice.
    counts : ndarray of int64, shape (number of words,)
        How many each word has.

    Examples
    --------
    >>> model = Model(dim=2, buckets=100, shortest=2, longest=3, words=2, dictionary=0, matrix=0)
    >>> ngram_rows(["né".encode()], model)  # <n <né né né> é>
    (array([55, 43, 65, 37, 81]), array([5]))
    """
    text = np.frombuffer(b"".join(b"<%b>" % word for word in words), np.uint8)
    starts = np.flatnonzero((text & 0xC0) != 0x80)  # of characters
    widths = np.diff(starts, append=len(text))
    after = np.searchsorted(
        starts, np.cumsum([len(word) + 2 for word in words])
    )  # the first of the next word
    counts = np.diff(after, prepend=0)
    first, last = np.repeat(after - counts, counts), np.repeat(after, counts)
    has_any = np.repeat([word != _END_OF_SENTENCE for word in words], counts)
    signed = text.astype(np.int8).astype(np.int32).view(np.uint32)
    hashes = np.full(len(starts), 2_166_136_261, np.uint32)
    columns, chosen = [], []
    for length in range(1, min(model.longest, int(counts.max(initial=0))) + 1):
        character = np.arange(length - 1, length - 1 + len(starts))  # which is added to each n-gram
        inside = np.flatnonzero((character < last) & has_any)
        for byte in range(int(widths[character[inside]].max(initial=0))):
            some = inside[widths[character[inside]] > byte]
            hashes[some] = (hashes[some] ^ signed[starts[character[some]] + byte]) * np.uint32(16_777_619)
        taken = np.zeros(len(starts), bool)
        taken[inside] = length >= model.shortest
        if length == 1:
            taken &= (character != first) & (character + 1 != last)
        columns.append(hashes % np.uint32(model.buckets))
        chosen.append(taken)
    if not columns:
        return np.empty(0, np.int64), np.zeros(len(words), np.int64)
    mask = np.stack(chosen, axis=1)
    return np.stack(columns, axis=1)[mask].astype(np.int64), np.add.reduceat(mask.sum(axis=1), after - counts)


class FastTextWords(FileVectors):
    """The words of an open model of fastText, with the vectors that fastText prints for them."""

    unit: Literal["row", "byte"] = "row"

    def __init__(self, stream: streams.Stream, view: memoryview, model: Model, options: ReadOptions) -> None:
        total = first_of(model.words, options.limit)
        super().__init__(stream, "fasttext-binary", model.dim, total)
        self.total = total
        self._view, self._model, self._errors = view, model, options.unicode_errors
        self._rows = _records(view, 4 * model.dim, model.matrix, model.words + model.buckets)

    def pieces(self) -> Iterator[Piece]:
        """Read the words, and the rows of each."""
        row = 0
        for some, end in _entries(self._view, self._model.dictionary, self._model.words, 0, self.name):
            words = some[: self.total - row]
            if not words:
                return
            rows = self._vectors(words, row)
            place = _place_of_words(row, end)
            require_finite(rows, self.name, place)
            keys = strings(pa.array(words, pa.binary()), self.name, place, self._errors)
            row += len(words)
            yield Piece(rows, keys, row)

    def _vectors(self, words: list[bytes], first: int) -> Float32Array:
        """Return the means of the rows of each word and its n-grams."""
        ngrams, counts = ngram_rows(words, self._model)
        own = np.arange(first, first + len(words))
        rows = np.insert(ngrams + self._model.words, np.cumsum(counts) - counts, own)
        counts = counts + 1
        ends = np.cumsum(counts)
        sums = np.zeros((len(words), self.dim), np.float32)
        step = max(1, _GATHERED // (4 * self.dim))
        for start in range(0, len(rows), step):
            some = _values(self._rows[rows[start : start + step]], self.dim)
            here = slice(
                int(np.searchsorted(ends, start, "right")),
                int(np.searchsorted(ends, start + len(some), "left")) + 1,
            )
            begins = np.maximum((ends - counts)[here] - start, 0)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, by its word
                sums[here] += np.add.reduceat(some, begins, axis=0)
        sums *= (1 / counts).astype(np.float32)[:, np.newaxis]
        return sums


def _place_of_words(first: int, end: int) -> Callable[[int], str]:
    return lambda row: f"before byte {end:,} (word {first + row:,})"


class FastTextMatrix(FileVectors):
    """All rows of an open model of fastText, of words and then of n-grams. Without keys, so it is a `RowReader`."""

    key_type: Literal["string", "int64"] | None = None
    unit: Literal["row", "byte"] = "row"

    def __init__(self, stream: streams.Stream, view: memoryview, model: Model, options: ReadOptions) -> None:
        total = first_of(model.words + model.buckets, options.limit)
        super().__init__(stream, "fasttext-binary", model.dim, total)
        self.total = total
        self._rows = _records(view, 4 * model.dim, model.matrix, total)

    def read(self, start: int, stop: int) -> Float32Array:
        """Read rows ``[start, stop)``; see `RowReader.read`.

        Raises
        ------
        SourceError
            A value is NaN or infinite.
        """
        rows = _values(self._rows[start:stop].copy(), self.dim)
        require_finite(rows, self.name, lambda row: f"row {start + row:,} of the input matrix")
        return rows

    def pieces(self) -> Iterator[Piece]:
        """Read the rows, of one block at a time."""
        step = block_rows(self.dim)
        for start in range(0, self.total, step):
            rows = self.read(start, start + step)
            yield Piece(rows, None, start + len(rows))


def open_fasttext_binary(source: object, options: ReadOptions) -> VectorSource:
    """Open a model of fastText (.bin), of version 11 or 12 and not quantised: its words, or all of its rows.

    Parameters
    ----------
    source : str or path-like
        A local file that is not compressed.
    options : ReadOptions
        `limit`, and `unicode_errors` for words. Of `member`, None stands for the words with the vectors that
        ``fasttext print-word-vectors`` prints, each the mean of the rows of the word and of its n-grams; ``"input"``
        for the matrix of these rows, first those of the words and then one for each bucket of n-grams, without keys.

    Returns
    -------
    VectorSource
        For the matrix also a `RowReader`.

    Raises
    ------
    SourceError
        It is no such model, or cut off; or, by `VectorSource.blocks`, a word is not UTF-8 or a value is not finite.
    OSError, TypeError, ValueError
        See `streams.open_stream`.
    """
    with streams.opening(source) as stream:
        refuse_unused(stream.name, options, "member", "unicode_errors")
        streams.refuse_packed(stream)
        if options.member not in (None, "input"):
            problem = f"there is no member {options.member!r}: 'input' is the matrix of all rows"
            raise refuse(stream.name, "", f"{problem}, and without a member words are read")
        view = stream.mapped()
        model = read_model(view, stream.name)
        kind = FastTextWords if options.member is None else FastTextMatrix
        return kind(stream, view, model, options)
