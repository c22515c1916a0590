"""English prose that comes with every Python, and the batches that word vectors are trained on.

Real text can be had without a download: in the language reference that ``help()`` prints, and in the docstrings and
comments of the standard library's source files. Together these are some 380,000 words.

1. `passages` reads the texts: a passage is a topic, a docstring or a block of comment lines. Files are read in order
   of their paths, so the text is always the same. Files that cannot be read are left out.
2. `prose` keeps the lines that are English rather than code, in lower case, and splits them into paragraphs.
3. `build` drops paragraphs that occurred before (licences, boilerplate of methods), and finds the most frequent words.
4. `Batches` cuts the text, once it is row ids, into batches. A batch depends only on the seed and its number, so a run
   that was stopped can continue as if nothing had happened.

Another version of Python has another library, and so another text; `Corpus.fingerprint` distinguishes them.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardemb.base.validation import Float32Array, Int64Array

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "Encoded",
    "build",
    "passages",
    "prose",
]

SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "ensurepip", "idle_test", "idlelib", "lib2to3"}
    | {"pydoc_data", "site-packages", "test", "tests", "turtledemo"}
)
"""Folders that are not installed everywhere, not part of the library, or without prose. (pydoc_data is imported.)"""

SPANS, SPAN_LENGTH = 256, 32
"""Spans of text in a batch, and words in a span: 8,192 words in all, with some 40,000 pairs of neighbours."""

WINDOW = 5
"""The largest distance of neighbours. The actual one is drawn for each word, so near neighbours count more."""

NOISE, NOISE_PER_PAIR = 32, 5
"""Random words per span, shared by all of its pairs; and how many of them each pair should be trained against."""

SUBSAMPLE = 1e-3
"""Words more frequent than this are subsampled, because "the" says little about its neighbours."""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*")
_PUNCTUATION = ".,;:!?()[]{}<>\"'`*|/-"
_WORDS_IN_PROSE = 0.7
_SHORTEST_PARAGRAPH = 3


@dataclass(frozen=True)
class Corpus:
    """A text.

    Attributes
    ----------
    words : tuple of str
        Its most frequent words, in descending order of frequency.
    passages : tuple of str
        All words of each passage, separated by blanks. Words of different passages are not neighbours.
    """

    words: tuple[str, ...]
    passages: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of words and passages: 16 hexadecimal digits, the same on every machine."""
        text = "\n".join([*self.words, "", *self.passages])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Encoded:
    """A text as row ids, without the words that have no row.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        The text.
    passage : ndarray of int64, shape (n,)
        Number of the passage that each word is in.
    """

    rows: Int64Array
    passage: Int64Array

    @property
    def counts(self) -> Int64Array:
        """Number of occurrences of each row, shape (largest row + 1,)."""
        return np.bincount(self.rows)


def build(vocabulary: int, stdlib: Path | None = None) -> Corpus:
    """Read the standard library's prose.

    Parameters
    ----------
    vocabulary : int
        How many of the most frequent words to keep; equally frequent ones are in alphabetical order. The result has
        fewer if the text does not have as many.
    stdlib : Path, optional
        Folder of source files; default: the standard library of this interpreter.

    Returns
    -------
    Corpus

    Raises
    ------
    FileNotFoundError
        There is no prose in `stdlib`. Some distributions ship the library without its sources.

    Examples
    --------
    >>> text = build(1000)
    >>> len(text.words), text.words[0], sum(len(passage.split()) for passage in text.passages) > 100_000
    (1000, 'the', True)
    """
    folder = stdlib or Path(sysconfig.get_paths()["stdlib"])
    texts = list(_without_repeats(folder))
    frequency = Counter(word for text in texts for word in text)
    if not frequency:
        msg = f"{folder} has no source files with English text; use a Python that keeps its library there"
        raise FileNotFoundError(msg)
    words = sorted(frequency, key=lambda word: (-frequency[word], word))[:vocabulary]
    return Corpus(tuple(words), tuple(" ".join(text) for text in texts))


@dataclass(frozen=True, eq=False)
class Batch:
    """Spans of text with all their pairs.

    Attributes
    ----------
    words : ndarray of int64, shape (spans, span_length)
        The text.
    contexts : ndarray of int64, shape (spans, span_length + noise)
        The same text again, as neighbours of the words, then the noise.
    weights : ndarray of float32, shape (spans, span_length, span_length + noise)
        Weight of the pair of a word and a context: 1 for neighbours, 0 for other words of the span. The noise of a word
        weighs `NOISE_PER_PAIR` times as much as its neighbours do, distributed evenly.
    """

    words: Int64Array
    contexts: Int64Array
    weights: Float32Array

    @property
    def pairs(self) -> int:
        """Number of pairs of neighbours."""
        return int(np.count_nonzero(self.weights[:, :, : self.words.shape[1]]))


class Batches:
    """The batches of a run: ``batches[step]`` depends on the text, the seed and the step, and nothing else.

    An epoch goes over the text once: it subsamples the frequent words, cuts what is left into spans, and shuffles
    these. Every epoch has `per_epoch` batches, so the step alone determines the epoch and the position in it.

    Examples
    --------
    >>> rows = np.random.default_rng(0).zipf(1.5, 100_000) % 1000
    >>> batch = Batches(Encoded(rows, np.arange(100_000) // 50), seed=0)[7]
    >>> batch.words.shape, batch.contexts.shape, batch.weights.shape
    ((256, 32), (256, 64), (256, 32, 64))
    """

    def __init__(self, text: Encoded, seed: int) -> None:
        counts = text.counts
        share = SUBSAMPLE * counts.sum() / np.maximum(counts, 1)
        self._text, self._seed = text, seed
        self._kept = np.minimum(np.sqrt(share) + share, 1.0)
        noise = np.cumsum(counts**0.75)
        self._noise = noise / noise[-1]
        self.per_epoch = max(1, int(counts @ self._kept) // (SPANS * SPAN_LENGTH))
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def __getitem__(self, step: int) -> Batch:
        """Make the batch of a step, counted from 0."""
        epoch, number = divmod(step, self.per_epoch)
        spans = self._epoch(epoch)
        # If an epoch happens to keep too few words, it starts over.
        positions = spans[np.arange(number * SPANS, (number + 1) * SPANS) % len(spans)]
        random = np.random.default_rng((self._seed, 1, step))
        words, passage = self._text.rows[positions], self._text.passage[positions]
        reach = random.integers(1, WINDOW + 1, size=words.shape)[:, :, None]
        noise = np.searchsorted(self._noise, random.random((SPANS, NOISE)), side="right")
        place = np.arange(SPAN_LENGTH)
        distance = np.abs(place[:, None] - place)
        near = (distance > 0) & (distance <= reach) & (passage[:, :, None] == passage[:, None, :])
        weights = np.empty((*words.shape, SPAN_LENGTH + NOISE), dtype=np.float32)
        weights[:, :, :SPAN_LENGTH] = near
        weights[:, :, SPAN_LENGTH:] = near.sum(axis=2, keepdims=True) * (NOISE_PER_PAIR / NOISE)
        return Batch(words, np.concatenate([words, noise], axis=1), weights)

    def _make_epoch(self, epoch: int) -> Int64Array:
        """Return positions in the text, shape (spans, SPAN_LENGTH), shuffled."""
        random = np.random.default_rng((self._seed, 0, epoch))
        kept = np.flatnonzero(random.random(len(self._text.rows)) < self._kept[self._text.rows])
        kept = kept[random.integers(SPAN_LENGTH) :]
        spans = kept[: len(kept) // SPAN_LENGTH * SPAN_LENGTH].reshape(-1, SPAN_LENGTH)
        return spans[random.permutation(len(spans))]


def passages(stdlib: Path) -> Iterator[str]:
    """Yield every topic of the language reference, then every docstring and comment of the source files."""
    yield from _topics()
    for path in _source_files(stdlib):
        try:
            with tokenize.open(path) as file:  # respects the file's declaration of its encoding
                source = file.read()
            with warnings.catch_warnings(
                action="ignore"
            ):  # the parser warns of odd escapes in other people's code
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        yield from _docstrings(tree)
        yield from _comments(source)


def prose(text: str) -> Iterator[list[str]]:
    r"""Yield the words of each paragraph, in lower case, without its lines of code.

    Examples
    --------
    >>> list(prose("Return the list.\n>>> f(1)\n\nx = f(y, 2)\n----\n"))
    [['return', 'the', 'list']]
    """
    for paragraph in re.split(r"\n\s*\n", text):
        words = [word for line in paragraph.split("\n") for word in _words(line)]
        if len(words) >= _SHORTEST_PARAGRAPH:
            yield words


def _without_repeats(stdlib: Path) -> Iterator[list[str]]:
    seen: set[tuple[str, ...]] = set()
    for passage in passages(stdlib):
        words: list[str] = []
        for paragraph in prose(passage):
            key = tuple(paragraph)
            if key not in seen:
                seen.add(key)
                words += paragraph
        if words:
            yield words


def _topics() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package the documentation separately
        return
    for name in sorted(topics):
        yield topics[name]


def _source_files(stdlib: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(stdlib):
        # os.walk follows this list, so it must be changed in place. Otherwise the file system would decide the order.
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(folder, name)


def _docstrings(tree: ast.AST) -> Iterator[str]:
    if isinstance(tree, _DOCUMENTED):
        text = ast.get_docstring(tree, clean=False)
        if text:
            yield text
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):  # expressions are many, and have no docstrings
            yield from _docstrings(child)


def _comments(source: str) -> Iterator[str]:
    # Only lines that are nothing but a comment: one after code is mostly a note on that code. tokenize would also
    # recognise a "#" within a string, but takes longer than the rest of this module together.
    block: list[str] = []
    for line in source.split("\n"):
        stripped = line.lstrip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#"))
        elif block:
            yield "\n".join(block)
            block.clear()
    if block:
        yield "\n".join(block)


def _words(line: str) -> list[str]:
    if line.lstrip().startswith((">>>", "...")):
        return []
    pieces = [piece for piece in (piece.strip(_PUNCTUATION).lower() for piece in line.split()) if piece]
    words = [piece for piece in pieces if _WORD.fullmatch(piece)]
    return words if len(words) >= max(2, _WORDS_IN_PROSE * len(pieces)) else []
