"""Text for an embedding layer: split sentences into tokens, find the rows of these, and pad.

1. A sentence is split into tokens: by `words`, by a function of your own, or by a tokenizer of Hugging Face.
2. The tokens are the keys of a `Vocabulary`. All tokens of a batch are looked up in one call.
3. The sentences of a batch become one array. Shorter ones are filled up with a row for padding; all tokens that have
   no row share one for unknown tokens.
4. A table of the vocabulary returns vectors for this array, ``table.rows.lookup(ids)``, and takes their gradients.

>>> import shardemb
>>> from shardemb import text
>>> store = shardemb.open(tmp / "sentences.zarr")
>>> vocabulary = store.create_vocabulary("words", key_type="string", reserved=2)
>>> table = store.create_table("words", vocabulary="words", embedding_dim=4, optimizer=shardemb.optim.Adam())
>>> encoder = text.Encoder(vocabulary)
>>> ids = encoder.encode(["To be or not to be,", "that is the question."], create=True)
>>> ids
array([[2, 3, 4, 5, 2, 3],
       [6, 7, 8, 9, 0, 0]])
>>> table.rows.lookup(ids).shape
(2, 6, 4)
>>> encoder.decode(encoder.encode(["To be, or what?"]))
[['to', 'be', 'or', '<unknown>']]
>>> commit = store.commit()
>>> store.close()
"""

from __future__ import annotations

import io
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, compress, groupby, islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from shardemb.base import paths as user_paths
from shardemb.base import validation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import ArrayLike, NDArray

    from shardemb.store.vocabulary import Vocabulary

__all__ = ["UNKNOWN", "Encoder", "Tokenizer", "read_lines", "words"]

UNKNOWN = "<unknown>"
"""What `Encoder.decode` returns for a reserved row. `words` never returns it."""

_ASCII_WORD = re.compile(r"[A-Za-z0-9_]+(?:['-][A-Za-z0-9_]+)*")
"""Finds what `_word` finds in a sentence that is all ASCII, in half the time."""


@runtime_checkable
class Tokenizer(Protocol):
    """What `Encoder` needs of a tokenizer; ``tokenizers.Tokenizer`` has it."""

    def encode_batch(self, sentences: list[str], /, *, add_special_tokens: bool) -> Sequence[Any]:
        """Return an object for each sentence, with ``tokens`` and an ``attention_mask`` of as many numbers."""


def words(sentence: str) -> list[str]:
    """Find the words of a sentence: letters, their marks, digits and underscores, of any script.

    An apostrophe or hyphen between two of these is part of the word. In scripts without spaces between words, it finds
    whole phrases; use a tokenizer for these.

    Parameters
    ----------
    sentence : str

    Returns
    -------
    list of str
        Pieces of the sentence, unchanged: their case is that of the sentence.

    Examples
    --------
    >>> shardemb.text.words("It's built-in -- isn't it? Naïve, हिन्दी, 42.")
    ["It's", 'built-in', "isn't", 'it', 'Naïve', 'हिन्दी', '42']
    """
    return (_ASCII_WORD if sentence.isascii() else _word()).findall(sentence)


@cache
def _word() -> re.Pattern[str]:
    """Compile the pattern of a word of any script."""
    # To re, a mark is not part of a word: it would cut "हिन्दी" in three, and split a decomposed "ï". The joiners of
    # Persian and Hindi also occur within words.
    marks = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M")]
    # As ranges, which re searches twice as fast as single characters: in a range, code point minus index is constant.
    ranges = [[c for _, c in run] for _, run in groupby(enumerate(marks), lambda each: each[1] - each[0])]
    joined = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in ranges)
    return re.compile(rf"\w+(?:['\u2019-]\w+|[{joined}\u200c\u200d]\w*)*")


def read_lines(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    r"""Yield the lines of text files, one file after the other.

    Parameters
    ----------
    paths : path-like or iterable of path-like
        Local files in UTF-8, not compressed. Invalid bytes become U+FFFD, so that one of them does not end a long run.

    Yields
    ------
    str
        Every line, including empty ones, without its newline. One line is in memory at a time.

    Raises
    ------
    TypeError
        What is given is no path: an open file, for example. Its lines are taken as sentences without `read_lines`.
    ValueError
        A file is compressed, or in UTF-16 or UTF-32, or no text at all, as its first bytes tell. Raised when its turn
        comes, before any of its lines. Also for a path that is a URL.
    OSError
        A file cannot be read. Raised when its turn comes.

    Examples
    --------
    >>> path = tmp / "hamlet.txt"
    >>> _ = path.write_text("To be, or not to be,\nthat is the question.\n")
    >>> list(shardemb.text.read_lines([path]))
    ['To be, or not to be,', 'that is the question.']
    """
    # An open file can be iterated over too, but its lines are no paths; nor are the keys of a mapping.
    is_one = isinstance(paths, str | bytes | os.PathLike | Mapping) or hasattr(paths, "read")
    for path in [paths] if is_one or not hasattr(paths, "__iter__") else paths:
        checked = user_paths.local_path(path, "a text file")
        with open(checked, "rb") as raw:
            _require_text(raw.peek(16), checked)
            with io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace") as file:
                for line in file:
                    yield line.removesuffix("\n")


_FORMATS = (
    (rb"\x1f\x8b", "compressed with gzip", "gzip.open(path, 'rt', encoding='utf-8')"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "compressed with bzip2", "bz2.open(path, 'rt', encoding='utf-8')"),
    (rb"\xfd7zXZ\0|\x5d\0\0", "compressed with xz", "lzma.open(path, 'rt', encoding='utf-8')"),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "compressed with zstd", None),
    (rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18", "compressed with lz4", None),
    (rb"\x1f[\x9d\xa0]|LZIP\x01|7z\xbc\xaf\x27\x1c|PK(\x03\x04|\x05\x06)", "compressed or an archive", None),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "in UTF-32", "open(path, encoding='utf-32')"),
    (rb"\xff\xfe|\xfe\xff", "in UTF-16", "open(path, encoding='utf-16')"),
    (rb"PAR1[\0-\x1f]|ARROW1\0\0|\x89HDF|\x93NUMPY|\x80[\x02-\x05]|SQLite format 3\0|%PDF-", "no text", None),
)
"""How files begin that are no text in UTF-8: pattern, what they are, and what opens them."""


def _require_text(begin: bytes, path: os.PathLike[str]) -> None:
    """Refuse a file by its first bytes. Decoded as text, it would be mojibake, each piece of which would get a row."""
    for pattern, what, opener in _FORMATS:
        if re.match(pattern, begin):
            way_out = f"pass the lines of {opener} instead" if opener else "convert it to a text file first"
            msg = f"{os.fspath(path)} is {what}: {way_out}"
            raise ValueError(msg)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns batches of sentences into arrays of row ids, and back. All of its state is in the vocabulary.

    Parameters
    ----------
    vocabulary : Vocabulary
        Of strings, with at least one reserved row.
    split : callable or Tokenizer
        Function of a sentence that returns its tokens, a list of str (or another sequence of them, or an iterator);
        default `words`. Or a ``tokenizers.Tokenizer``, of which the ``tokens`` are used, but not its special tokens and
        padding: there are reserved rows for these.
    lower : bool
        Convert sentences to lower case before a function splits them. A tokenizer has its own rules for that, so it
        gets sentences as they are.
    max_length : int, optional
        Maximum number of tokens per sentence. Tokens after these are neither looked up nor added.
    padding_row : int
        Reserved row of the vocabulary that fills up short sentences.
    unknown_row : int
        Reserved row for tokens that have no row; may be the same one.

    Raises
    ------
    TypeError, ValueError
        The keys are not strings, a row is not reserved, a number is out of range, or `split` is neither of the above.

    Examples
    --------
    >>> import shardemb
    >>> from shardemb import text
    >>> with shardemb.open(tmp / "letters.zarr") as store:
    ...     letters = store.create_vocabulary("letters", key_type="string", reserved=1)
    ...     encoder = text.Encoder(letters, split=list, max_length=3, unknown_row=0)
    ...     encoder.encode(["abba", "b"], create=True)
    ...     commit = store.commit()
    array([[1, 2, 2],
           [2, 0, 0]])
    """

    vocabulary: Vocabulary = field(kw_only=False)
    split: Callable[[str], Iterable[str]] | Tokenizer = words
    lower: bool = True
    max_length: int | None = None
    padding_row: int = 0
    unknown_row: int = 1

    def __post_init__(self) -> None:
        vocabulary = self.vocabulary
        if vocabulary.key_type != "string":
            msg = f"vocabulary {vocabulary.name!r} has keys of {vocabulary.key_type}, but tokens are strings"
            raise TypeError(msg)
        _require_split(self.split)
        for name in ("padding_row", "unknown_row"):
            row = validation.count(getattr(self, name), name, minimum=0)
            if row >= vocabulary.reserved:
                msg = (
                    f"{name} is {row}, but vocabulary {vocabulary.name!r} reserves {vocabulary.reserved} rows: "
                    f"create it with create_vocabulary(..., reserved={row + 1}), or choose a lower row"
                )
                raise ValueError(msg)
        if self.max_length is not None:
            validation.count(self.max_length, "max_length")

    def encode(self, sentences: Iterable[str], *, create: bool = False) -> NDArray[np.int64]:
        """Find the rows of all tokens of a batch of sentences, in one call to the vocabulary.

        Parameters
        ----------
        sentences : iterable of str
        create : bool
            Add new tokens to the vocabulary first, as `Vocabulary.add` does, in the order in which they occur.

        Returns
        -------
        ndarray of int64, shape (number of sentences, length)
            The length is that of the longest sentence, 0 if no sentence has a token. Shorter sentences are filled up
            with `padding_row`. Tokens without a row, including those not admitted yet, become `unknown_row`.

        Raises
        ------
        TypeError
            `sentences` is a single string, a mapping or a table, or one of them is not a string. Or `split` returned
            something other than a list of str: a tokenizer of ``transformers`` returns a mapping, for example. No token
            was added.
        ValueError
            A token cannot be encoded in UTF-8, or a tokenizer did not return as many results as there are sentences. No
            token was added.
        ReadOnlyError, StoreClosedError, VocabularyNotFoundError, DiskFullError
            As for `Vocabulary.lookup` and, with `create`, `Vocabulary.add`. No token was added.

        Examples
        --------
        >>> encoder.encode(["To be or not to be", "", "That is"], create=True)
        array([[2, 3, 4, 5, 2, 3],
               [0, 0, 0, 0, 0, 0],
               [6, 7, 0, 0, 0, 0]])
        >>> encoder.encode(["Not that question"])
        array([[5, 6, 1]])
        """
        tokens = self._tokens(list(_several(sentences)))
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        flat = list(chain.from_iterable(tokens))
        rows = self.vocabulary.add(flat) if create else self.vocabulary.lookup(flat)
        ids = np.full((lengths.size, lengths.max(initial=0)), self.padding_row, np.int64)
        ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.where(rows < 0, self.unknown_row, rows)
        return ids

    def batches(
        self, sentences: Iterable[str], size: int, *, create: bool = False
    ) -> Iterator[NDArray[np.int64]]:
        """Encode a stream of sentences, with only one batch in memory at a time.

        Parameters
        ----------
        sentences : iterable of str
            For example, what `read_lines` yields.
        size : int
            Sentences in a batch; the last one may have fewer.
        create : bool
            As for `encode`.

        Yields
        ------
        ndarray of int64, shape (size, length)
            What `encode` returns; each batch has its own length.

        Raises
        ------
        TypeError, ValueError
            As for `encode`, when the batch is asked for; the batches before it are done. A wrong `size` is refused
            immediately.

        Examples
        --------
        >>> [ids.shape for ids in encoder.batches(["To be", "or not", "to be"], 2, create=True)]
        [(2, 2), (1, 2)]
        """
        size, stream = validation.count(size, "size"), _several(sentences)
        return (self.encode(some, create=create) for some in iter(lambda: list(islice(stream, size)), []))

    def decode(self, ids: ArrayLike) -> list[list[str]]:
        """Return the tokens of encoded sentences.

        Parameters
        ----------
        ids : array_like of int, shape (n, length)
            As `encode` returns them.

        Returns
        -------
        list of list of str
            Without padding. Other reserved rows become `UNKNOWN`.

        Raises
        ------
        RowIdError
            A row has no key: it was never assigned one, or has lost it since.
        TypeError, ValueError
            The ids are not integers, or do not have two dimensions.
        StoreClosedError, VocabularyNotFoundError
            As for `Vocabulary.keys`.

        Examples
        --------
        >>> encoder.decode(encoder.encode(["To be", "Or"], create=True))
        [['to', 'be'], ['or']]
        """
        vocabulary = self.vocabulary
        checked = validation.row_ids(ids, max(vocabulary.num_rows, 1), vocabulary.name)
        if len(checked.shape) != 2:
            msg = f"ids must have two dimensions, as encode returns them, got shape {checked.shape}"
            raise ValueError(msg)
        rows, which = np.unique(checked.flat, return_inverse=True)
        tokens = np.full(rows.size, UNKNOWN, object)
        assigned = rows >= vocabulary.reserved
        tokens[assigned] = vocabulary.keys(rows[assigned])
        kept = (checked.flat != self.padding_row).reshape(checked.shape)
        found = tokens[which].reshape(checked.shape)
        return [sentence[keep].tolist() for sentence, keep in zip(found, kept, strict=True)]

    def _tokens(self, sentences: list[str]) -> list[list[str]]:
        if isinstance(self.split, Tokenizer):
            split = _tokens_of_batch(self.split, sentences)
        elif self.lower:
            split = [_token_list(self.split(sentence.lower())) for sentence in sentences]
        else:
            split = [_token_list(self.split(sentence)) for sentence in sentences]
        return split if self.max_length is None else [tokens[: self.max_length] for tokens in split]


_OF_TRANSFORMERS = (
    "for a tokenizer of transformers, pass split=tokenizer.backend_tokenizer or split=tokenizer.tokenize"
)


def _require_split(split: object) -> None:
    if isinstance(split, Tokenizer) and not isinstance(split, type):
        return
    if not callable(split) or hasattr(split, "backend_tokenizer"):
        msg = (
            f"split must be a function of a string, or a tokenizer with encode_batch, got {split!r:.80}; "
            f"{_OF_TRANSFORMERS}"
        )
        raise TypeError(msg)


def _tokens_of_batch(tokenizer: Tokenizer, sentences: list[str]) -> list[list[str]]:
    encoded = tokenizer.encode_batch(sentences, add_special_tokens=False)
    if len(encoded) != len(sentences):
        msg = f"split: encode_batch returned {len(encoded)} results for {len(sentences)} sentences"
        raise ValueError(msg)
    split = []
    for each in encoded:
        tokens, mask = _token_list(each.tokens), each.attention_mask
        if len(mask) != len(tokens):
            msg = f"split: encode_batch returned {len(tokens)} tokens with an attention_mask of {len(mask)} numbers"
            raise ValueError(msg)
        # The mask is 0 for padding, if the tokenizer is configured to pad.
        split.append(list(compress(tokens, mask)))
    return split


def _token_list(found: object) -> list[str]:
    """Check the tokens of a sentence.

    Iterating over whatever can be iterated over would make tokens of the letters of a string, or of the names of the
    fields of a mapping.
    """
    is_sequence = isinstance(found, Sequence | Iterator) and not isinstance(found, str | bytes | bytearray)
    if isinstance(found, np.ndarray) and found.ndim == 1:
        is_sequence, found = True, found.tolist()
    if not is_sequence:
        msg = (
            f"split must return a list of str, got {type(found).__name__}: {found!r:.80}; "
            f"{_OF_TRANSFORMERS if isinstance(found, Mapping) else 'return the tokens of the sentence, in order'}"
        )
        raise TypeError(msg)
    tokens: list[str] = list(found)  # type: ignore[call-overload]
    if not all(issubclass(kind, str) for kind in set(map(type, tokens))):
        wrong = next(each for each in tokens if not isinstance(each, str))
        msg = f"split must return a list of str, got one with {type(wrong).__name__}: {wrong!r:.80}"
        raise TypeError(msg)
    return tokens


def _several(sentences: Iterable[object]) -> Iterator[str]:
    """Refuse what are not sentences.

    A single string would be taken for as many sentences as it has letters, a mapping or a data frame for the names of
    its columns.
    """
    if isinstance(sentences, str | bytes):
        msg = f"sentences must be several strings, got {sentences!r:.80}; put it into a list"
        raise TypeError(msg)
    if isinstance(sentences, Mapping) or getattr(sentences, "ndim", 1) != 1:
        msg = (
            f"sentences must be several strings, got {type(sentences).__name__}: pass one of its columns, "
            f"for example batch['text']"
        )
        raise TypeError(msg)
    return map(_sentence, sentences)


def _sentence(given: object) -> str:
    if not isinstance(given, str):
        msg = f"a sentence must be a str, got {given!r:.80}; convert an Arrow column with to_pylist()"
        raise TypeError(msg)
    return given
