"""What does an embedding layer do with sentences? Cuts them into words, finds the rows of these, and pads.

1. A sentence is split into tokens: by `words`, by a function of your own, or by a tokenizer of Hugging Face.
2. The tokens are the keys of a `Vocabulary`. All those of a batch are looked up in one call.
3. Sentences of one batch become one array: shorter ones are filled up with a row that stands for nothing. Words that
   have no row get one that stands for all of them.
4. A table of the vocabulary gives vectors for this array, ``table.rows.lookup(ids)``, and takes their gradients.

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

import os
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, compress, groupby, islice
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from shardemb.base import validation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    from shardemb.store.vocabulary import Vocabulary

__all__ = ["UNKNOWN", "Encoder", "Tokenizer", "read_lines", "words"]

UNKNOWN = "<unknown>"
"""What `Encoder.decode` gives for a reserved row: `words` never finds such a word."""

_ASCII_WORD = re.compile(r"[A-Za-z0-9_]+(?:['-][A-Za-z0-9_]+)*")
"""What `_word` finds where all is ASCII, in half the time."""


@runtime_checkable
class Tokenizer(Protocol):
    """What `Encoder` asks of a tokenizer; ``tokenizers.Tokenizer`` is one."""

    def encode_batch(self, sentences: list[str], /, *, add_special_tokens: bool) -> Sequence[Any]:
        """Return for each sentence an object with ``tokens`` and, for each of these, ``attention_mask``."""


def words(sentence: str) -> list[str]:
    """Find the words of a sentence: letters, their marks, digits and underscores, of any script.

    An apostrophe or hyphen between two of these is part of the word. Scripts that put no blanks between words give
    whole phrases: take a tokenizer for them.

    Parameters
    ----------
    sentence : str

    Returns
    -------
    list of str
        Pieces of the sentence as they stand there, in lower case only if that is.

    Examples
    --------
    >>> shardemb.text.words("It's built-in -- isn't it? Naïve, हिन्दी, 42.")
    ["It's", 'built-in', "isn't", 'it', 'Naïve', 'हिन्दी', '42']
    """
    return (_ASCII_WORD if sentence.isascii() else _word()).findall(sentence)


@cache
def _word() -> re.Pattern[str]:
    """Make the pattern of a word of any script."""
    # To re a mark is no part of a word: it would cut "हिन्दी" in three, and an "ï" of two code points off its "i". The
    # joiners of Persian and Hindi stand within words as well.
    marks = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c)).startswith("M")]
    # As ranges, which re searches twice as fast as single characters. In a range, code point less number is the same.
    ranges = [[c for _, c in run] for _, run in groupby(enumerate(marks), lambda each: each[1] - each[0])]
    joined = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in ranges)
    return re.compile(rf"\w+(?:['\u2019-]\w+|[{joined}\u200c\u200d]\w*)*")


def read_lines(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    r"""Read text files line by line, one file after the other.

    Parameters
    ----------
    paths : path-like or iterable of path-like
        Files in UTF-8. What is none in them becomes U+FFFD, so that one bad byte does not end a long run.

    Yields
    ------
    str
        Every line, empty ones too, without its end. One line is in memory at a time.

    Raises
    ------
    OSError
        When the turn of a file comes that cannot be read.

    Examples
    --------
    >>> path = tmp / "hamlet.txt"
    >>> _ = path.write_text("To be, or not to be,\nthat is the question.\n")
    >>> list(shardemb.text.read_lines([path]))
    ['To be, or not to be,', 'that is the question.']
    """
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for line in file:
                yield line.removesuffix("\n")


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Sentences to row ids of one shape, and back. Keeps nothing of what it has seen: that is in the vocabulary.

    Parameters
    ----------
    vocabulary : Vocabulary
        Of strings, with at least one reserved row.
    split : callable or Tokenizer
        Function of a sentence that returns its tokens, list of str; default `words`. Or a ``tokenizers.Tokenizer``,
        of which ``tokens`` are taken: without special ones and padding, which an embedding has rows of its own for.
    lower : bool
        Sentences are made lower case before a function splits them. A tokenizer has rules of its own for that, and gets
        them as they are.
    max_length : int, optional
        Tokens of a sentence that are kept, from its beginning. What is cut off is neither looked up nor added.
    padding_row : int
        Reserved row of the vocabulary that fills up short sentences.
    unknown_row : int
        Reserved row for tokens that have no row; may be the same.

    Raises
    ------
    TypeError, ValueError
        Keys that are no strings; rows that are not reserved; a number out of range; a `split` that cannot split.

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
            msg = f"vocabulary {vocabulary.name!r} has keys of {vocabulary.key_type}, and tokens are strings"
            raise TypeError(msg)
        _require_split(self.split)
        for name in ("padding_row", "unknown_row"):
            row = validation.count(getattr(self, name), name, minimum=0)
            if row >= vocabulary.reserved:
                msg = (
                    f"{name} is {row}, but vocabulary {vocabulary.name!r} reserves {vocabulary.reserved} rows: "
                    f"make it by create_vocabulary(..., reserved={row + 1}), or name a lower row"
                )
                raise ValueError(msg)
        if self.max_length is not None:
            validation.count(self.max_length, "max_length")

    def encode(self, sentences: Iterable[str], *, create: bool = False) -> NDArray[np.int64]:
        """Find the rows of all tokens of some sentences, in one call to the vocabulary.

        Parameters
        ----------
        sentences : iterable of str
        create : bool
            Give new tokens rows first, as `Vocabulary.add` does, in the order in which they are read.

        Returns
        -------
        ndarray of int64, shape (number of sentences, length)
            The longest sentence decides the length, which is 0 where no sentence has a token. `padding_row` fills up
            the others; `unknown_row` stands for tokens without a row, be it that they are not admitted yet.

        Raises
        ------
        TypeError
            A single string, or something in between that is none.
        ValueError
            A token has no UTF-8.
        ReadOnlyError, StoreClosedError, VocabularyNotFoundError, DiskFullError
            As `Vocabulary.lookup` and, with `create`, `Vocabulary.add`; no token was added.

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
        """Encode a stream of sentences, of which only one batch is in memory.

        Parameters
        ----------
        sentences : iterable of str
            As `read_lines` yields them, say.
        size : int
            Sentences of a batch; the last one may have fewer.
        create : bool
            As for `encode`.

        Yields
        ------
        ndarray of int64, shape (size, length)
            What `encode` returns; each batch has a length of its own.

        Raises
        ------
        TypeError, ValueError
            As `encode`, for the batch that is asked for; those before it are done. A `size` that is none, at once.

        Examples
        --------
        >>> [ids.shape for ids in encoder.batches(["To be", "or not", "to be"], 2, create=True)]
        [(2, 2), (1, 2)]
        """
        size, stream = validation.count(size, "size"), _several(sentences)
        return (self.encode(some, create=create) for some in iter(lambda: list(islice(stream, size)), []))

    def decode(self, ids: ArrayLike) -> list[list[str]]:
        """Find the tokens of encoded sentences.

        Parameters
        ----------
        ids : array_like of int, shape (n, length)
            As `encode` returns them.

        Returns
        -------
        list of list of str
            Without padding. `UNKNOWN` stands for other reserved rows.

        Raises
        ------
        RowIdError
            A row has no key: it was never given out, or has lost it since.
        TypeError, ValueError
            No integers; another number of dimensions.
        StoreClosedError, VocabularyNotFoundError
            As `Vocabulary.keys`.

        Examples
        --------
        >>> encoder.decode(encoder.encode(["To be", "Or"], create=True))
        [['to', 'be'], ['or']]
        """
        vocabulary = self.vocabulary
        checked = validation.row_ids(ids, max(vocabulary.num_rows, 1), vocabulary.name)
        if len(checked.shape) != 2:
            msg = f"ids must have the two dimensions of what encode returns, got shape {checked.shape}"
            raise ValueError(msg)
        rows, which = np.unique(checked.flat, return_inverse=True)
        tokens = np.full(rows.size, UNKNOWN, object)
        given_out = rows >= vocabulary.reserved
        tokens[given_out] = vocabulary.keys(rows[given_out])
        kept = (checked.flat != self.padding_row).reshape(checked.shape)
        found = tokens[which].reshape(checked.shape)
        return [sentence[keep].tolist() for sentence, keep in zip(found, kept, strict=True)]

    def _tokens(self, sentences: list[str]) -> list[list[str]]:
        if isinstance(self.split, Tokenizer):
            encoded = self.split.encode_batch(sentences, add_special_tokens=False)
            # The mask tells padding, where the tokenizer was told to pad.
            split = [list(compress(each.tokens, each.attention_mask)) for each in encoded]
        elif self.lower:
            split = [list(self.split(sentence.lower())) for sentence in sentences]
        else:
            split = [list(self.split(sentence)) for sentence in sentences]
        return split if self.max_length is None else [tokens[: self.max_length] for tokens in split]


def _require_split(split: object) -> None:
    if not callable(split) and not isinstance(split, Tokenizer):
        msg = f"split must be a function of a string, or a tokenizer with encode_batch, got {split!r:.80}"
        raise TypeError(msg)


def _several(sentences: Iterable[object]) -> Iterator[str]:
    """Refuse what are no sentences; a single string would be taken for as many as it has letters."""
    if isinstance(sentences, str | bytes):
        msg = f"sentences must be several strings, got {sentences!r:.80}; put it into a list"
        raise TypeError(msg)
    return map(_sentence, sentences)


def _sentence(given: object) -> str:
    if not isinstance(given, str):
        msg = f"a sentence must be a str, got {given!r:.80}; an Arrow column becomes strings by to_pylist()"
        raise TypeError(msg)
    return given
