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
        Files in UTF-8. Invalid bytes become U+FFFD, so that one of them does not end a long run.

    Yields
    ------
    str
        Every line, including empty ones, without its newline. One line is in memory at a time.

    Raises
    ------
    OSError
        A file cannot be read. Raised when its turn comes.

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
    """Turns batches of sentences into arrays of row ids, and back. All of its state is in the vocabulary.

    Parameters
    ----------
    vocabulary : Vocabulary
        Of strings, with at least one reserved row.
    split : callable or Tokenizer
        Function of a sentence that returns its tokens, a list of str; default `words`. Or a ``tokenizers.Tokenizer``,
        of which the ``tokens`` are used, but not its special tokens and padding: there are reserved rows for these.
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
            `sentences` is a single string, or one of them is not a string.
        ValueError
            A token cannot be encoded in UTF-8.
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
            encoded = self.split.encode_batch(sentences, add_special_tokens=False)
            # The mask is 0 for padding, if the tokenizer is configured to pad.
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
    """Refuse what are not sentences. A single string would be taken for as many sentences as it has letters."""
    if isinstance(sentences, str | bytes):
        msg = f"sentences must be several strings, got {sentences!r:.80}; put it into a list"
        raise TypeError(msg)
    return map(_sentence, sentences)


def _sentence(given: object) -> str:
    if not isinstance(given, str):
        msg = f"a sentence must be a str, got {given!r:.80}; convert an Arrow column with to_pylist()"
        raise TypeError(msg)
    return given
