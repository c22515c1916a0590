"""Word vectors from the standard library's own prose: the whole life of a store in one short program.

This is how to train embeddings with shardemb. A vocabulary gives each word a row, and two tables in one store have
these rows: ``words`` holds the vectors that are wanted, ``contexts`` those that they are trained against. The method is
skip-gram with negative sampling (Mikolov and others, "Distributed representations of words and phrases and their
compositionality", 2013). Before the first step, `encode` turns the text into row ids. Then each step has five parts:

1. `corpus.Batches` makes the batch, as a function of nothing but (seed, step).
2. ``lookup`` reads the rows of both tables.
3. `gradients` does the mathematics: three matrix products in NumPy.
4. ``update`` takes one optimizer step on each row of the batch.
5. Every `commit_every` steps, ``store.commit`` makes everything durable, together with the step and the options.

So whatever stops a run, the next one continues from the last commit and ends with the same bits as a run that was never
stopped. (This holds on one machine: another processor's matrix product may round differently.)

A run leaves two things in its folder::

    store.zarr/       the store with the vocabulary and both tables
    words.parquet     the table "words": columns id, key (the word) and embedding
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

import shardemb
from shardemb.base import paths
from shardemb.base.formatting import size
from shardemb.base.progress import track
from shardemb.quickstart import corpus
from shardemb.text import Encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardemb.base.validation import Float32Array

__all__ = ["OptionError", "Options", "Result", "encode", "gradients", "nearest", "run"]

LEARNING_RATE = 0.3
"""High, because Adagrad divides by the size of past gradients: the sum over a word's hundreds of pairs in a batch moves
it no further than a single pair would. So frequent words do not diverge, and rare ones still move."""

_FIXED = ("vocabulary", "dim", "seed")
"""Options that cannot change from one run in a folder to the next."""

SHOWN = (
    *("list", "string", "bytes", "integer", "true", "exception"),
    *("class", "function", "module", "file", "thread", "server"),
)
"""Words whose neighbours are shown at the end."""

PASSAGES = 256
"""Passages encoded in one call, each padded to the longest of them."""

FREQUENT = 2000
"""Neighbours are searched among this many words: rarer ones occur too seldom to have good vectors."""


class OptionError(shardemb.ShardEmbError, ValueError):
    """An option is out of range, or differs from what the folder was trained with."""


@dataclass(frozen=True)
class Options:
    """What a run is asked to do.

    Attributes
    ----------
    folder : path-like
        Where everything is stored, on a local disk; created if missing. Becomes a `Path`.
    vocabulary : int
        Number of words that get a row: the most frequent ones.
    dim : int
        Dimension of a vector.
    steps : int
        Batches to train on, including those of earlier runs in this folder.
    seed : int
        Seed of the initial vectors and of the batches; at least 0.
    commit_every : int
        Steps between two commits, and between two lines of output if that is not a terminal.

    Raises
    ------
    OptionError
        A number is out of range.
    TypeError, ValueError
        The folder is not a local path.
    """

    folder: Path = Path("quickstart")
    vocabulary: int = 5000
    dim: int = 64
    steps: int = 800
    seed: int = 0
    commit_every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", paths.local_path(self.folder, "the folder of the quickstart"))
        for name, least in {"vocabulary": 2, "dim": 1, "steps": 1, "seed": 0, "commit_every": 1}.items():
            if getattr(self, name) < least:
                raise OptionError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def store(self) -> Path:
        """Path of the store."""
        return self.folder / "store.zarr"

    @property
    def parquet(self) -> Path:
        """Path of the words and vectors, for programs that do not use shardemb."""
        return self.folder / "words.parquet"


@dataclass(frozen=True)
class Result:
    """Outcome of a run.

    Attributes
    ----------
    steps : int
        Steps that the vectors have been trained for, in all runs together.
    trained : int
        How many of these this run made.
    loss : float
        Mean loss of a pair in the steps before the last commit.
    neighbours : mapping of str to tuple of str
        What `nearest` finds for the words of `SHOWN`.
    bytes_on_disk : int
        Disk space that the store takes. Its files are sparse, so ``ls -l`` shows more.
    parquet : Path
        Words and vectors, in the order of the rows: the most frequent word first.
    """

    steps: int
    trained: int
    loss: float
    neighbours: Mapping[str, tuple[str, ...]]
    bytes_on_disk: int
    parquet: Path


# ---- the text


def encode(passages: Sequence[str], vocabulary: shardemb.Vocabulary) -> corpus.Encoded:
    """Turn passages into row ids; words that have no row are left out.

    Parameters
    ----------
    passages : sequence of str
    vocabulary : Vocabulary
        With two reserved rows.

    Examples
    --------
    >>> with shardemb.open(tmp / "store.zarr") as store:
    ...     words = store.create_vocabulary("words", key_type="string", reserved=2)
    ...     rows = words.add(["the", "list"])
    ...     text = encode(["the list", "a list of the list"], words)
    ...     commit = store.commit()
    >>> text.rows, text.passage
    (array([2, 3, 3, 2, 3]), array([0, 0, 1, 1, 1]))
    """
    rows, passage, before = [], [], 0
    for ids in Encoder(vocabulary).batches(passages, PASSAGES):
        is_word = ids >= vocabulary.reserved
        rows.append(ids[is_word])
        passage.append(before + np.nonzero(is_word)[0])
        before += len(ids)
    return corpus.Encoded(np.concatenate(rows), np.concatenate(passage))


# ---- the mathematics


def gradients(
    words: Float32Array, contexts: Float32Array, weights: Float32Array
) -> tuple[float, Float32Array, Float32Array]:
    """Compute the loss of a batch, and its derivatives with respect to all rows that were looked up.

    The loss is the sum of ``-log(sigmoid(score))`` over the neighbours and of ``-log(sigmoid(-score))`` over
    the noise, each times its weight; the score of a word and a context is the dot product of their rows.

    Parameters
    ----------
    words, contexts : ndarray of float32, shape (spans, span_length, dim) and (spans, span_length + noise, dim)
        Rows of the words, and of the contexts with the noise last.
    weights : ndarray of float32, shape (spans, span_length, span_length + noise)
        As in `corpus.Batch`.

    Returns
    -------
    loss : float
    words_gradient, contexts_gradient : ndarray of float32
        In the shapes of `words` and `contexts`. The gradient of a row that was looked up twice is in two parts, which
        ``store.update`` adds up.

    Examples
    --------
    >>> one = np.ones((1, 1, 1), np.float32)
    >>> loss, words_gradient, contexts_gradient = gradients(0 * one, 2 * one, one)
    >>> round(loss, 4), words_gradient, contexts_gradient + 0
    (0.6931, array([[[-1.]]], dtype=float32), array([[[0.]]], dtype=float32))
    """
    is_neighbour = np.arange(contexts.shape[1]) < words.shape[1]
    sign = np.where(is_neighbour, 1, -1).astype(words.dtype)
    # Beyond 30 the sigmoid is 1 in float32; far beyond it, exp would overflow.
    scores = np.clip(words @ contexts.transpose(0, 2, 1) * sign, -30, 30)
    right = 1 / (1 + np.exp(-scores))
    loss = -float(np.sum(weights * np.log(right)))
    slope = weights * sign * (right - 1)
    return loss, slope @ contexts, slope.transpose(0, 2, 1) @ words


def nearest(word: str, words: Sequence[str], vectors: Float32Array, count: int = 8) -> tuple[str, ...]:
    """Return the words whose vectors have the smallest angles to that of `word`, nearest first, without itself.

    Parameters
    ----------
    word, words : str and sequence of str
        One word, and all of them in the order of the rows.
    vectors : ndarray of float32, shape (len(words), dim)
        Their rows.
    count : int
        How many to return, at most.

    Examples
    --------
    >>> nearest("a", ["a", "b", "c"], np.array([[1, 0], [0, 1], [2, 1]], np.float32))
    ('c', 'b')
    """
    row = words.index(word)
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    order = np.argsort(-(unit @ unit[row]), kind="stable")
    return tuple(words[r] for r in order if r != row)[:count]


# ---- the run


def run(options: Options, console: Console | None = None) -> Result:
    """Train, or continue to train, and show what was learnt.

    Parameters
    ----------
    options : Options
        What to do.
    console : rich.console.Console, optional
        Where to report; default stdout. A terminal gets a live bar, anything else one line per commit.

    Raises
    ------
    OptionError
        The folder was trained with another vocabulary, dim or seed, or on the text of another Python. Nothing was
        changed.
    FileNotFoundError
        This Python has no source files of the standard library.
    SystemExit
        On Ctrl-C, with code 130. The store is closed, and the next run continues from its last commit.

    Examples
    --------
    >>> options = Options(tmp / "quickstart", vocabulary=500, dim=8, steps=2, commit_every=1)
    >>> result = run(options, Console(quiet=True))
    >>> result.steps, result.parquet.name, sorted(path.name for path in options.folder.iterdir())
    (2, 'words.parquet', ['store.zarr', 'words.parquet'])
    """
    console = console or Console()
    try:
        return _run(options, console)
    except KeyboardInterrupt:
        _say(console, f"\nStopped. {_saved(options)} Run the same command again to continue.")
        raise SystemExit(130) from None


def _run(options: Options, console: Console) -> Result:
    options.folder.mkdir(parents=True, exist_ok=True)
    with shardemb.open(options.store) as store:
        before = last = store.last_commit
        if before is not None:
            _check_options(options, before.metadata)
        if last is None or last.step < options.steps:
            try:
                last = _train(store, options, console)
            except KeyboardInterrupt:
                store.rollback()  # on purpose: close() warns of changes that were merely forgotten
                raise
        else:
            _say(console, f"{options.folder} is trained already: {last.step:,} steps")
        words, vectors = _frequent(store)
        store["words"].export_parquet(options.parquet)
    result = Result(
        steps=last.step,
        trained=last.step - (before.step if before else 0),
        loss=last.metadata["loss"],
        neighbours={word: nearest(word, words, vectors) for word in SHOWN if word in words},
        bytes_on_disk=sum(path.lstat().st_blocks * 512 for path in options.store.rglob("*")),
        parquet=options.parquet,
    )
    _show(options, result, console)
    return result


def _train(store: shardemb.Store, options: Options, console: Console) -> shardemb.Commit:
    text = corpus.build(options.vocabulary)
    last = store.last_commit or _begin(store, options, text)
    if last.metadata["text"] != text.fingerprint:
        raise _refusal(options, f"{options.folder} was trained on another Python's text; use that Python")
    encoded = encode(text.passages, store.vocabularies["words"])
    _say(console, f"Text: {len(encoded.rows):,} words of prose, {len(text.words):,} different ones")
    if last.step:
        _say(console, f"Continuing from step {last.step:,}")
    batches = corpus.Batches(encoded, options.seed)
    meter = _Meter(store)
    left = options.steps - last.step
    with track(left, "training", unit="step", progress=console.is_terminal) as advance:
        for step in range(last.step + 1, options.steps + 1):
            batch = batches[step - 1]
            meter.add(batch, _step(store, batch))
            if step % options.commit_every == 0 or step == options.steps:
                last = store.commit(step=step, metadata={**last.metadata, "loss": meter.loss})
                _say(console, f"step {step:>{len(f'{options.steps:,}')},} of {options.steps:,}   {meter}")
                meter = _Meter(store)
            advance(1)
    return last


def _begin(store: shardemb.Store, options: Options, text: corpus.Corpus) -> shardemb.Commit:
    words = store.create_vocabulary("words", key_type="string", reserved=2)
    words.add(text.words)
    # By default a table begins with rows for a million words, so that it can grow; this vocabulary will not grow.
    create = partial(
        store.create_table, vocabulary="words", embedding_dim=options.dim, rows_per_shard=words.num_rows
    )
    optimizer = shardemb.optim.Adagrad(lr=LEARNING_RATE)
    width = 0.5 / options.dim**0.5
    uniform = shardemb.initializers.Uniform(-width, width, seed=options.seed)
    create("words", initializer=uniform, optimizer=optimizer)
    create("contexts", optimizer=optimizer)
    facts = {"text": text.fingerprint}
    return store.commit(step=0, metadata=facts | {name: getattr(options, name) for name in _FIXED})


def _step(store: shardemb.Store, batch: corpus.Batch) -> float:
    """Train on one batch; return its loss, summed over its pairs."""
    words, contexts = _rows(store, "words"), _rows(store, "contexts")
    loss, words_gradient, contexts_gradient = gradients(
        words.lookup(batch.words), contexts.lookup(batch.contexts), batch.weights
    )
    words.update(batch.words, words_gradient)
    contexts.update(batch.contexts, contexts_gradient)
    return loss


def _rows(store: shardemb.Store, name: str) -> shardemb.Table:
    """Return one of the two tables as a `Table` of row ids."""
    table = store[name]
    assert isinstance(table, shardemb.KeyedTable)
    return table.rows


def _frequent(store: shardemb.Store) -> tuple[list[str], Float32Array]:
    """Return the most frequent words and their vectors."""
    vocabulary = store.vocabularies["words"]
    rows = np.arange(vocabulary.reserved, vocabulary.num_rows)[:FREQUENT]
    return vocabulary.keys(rows).tolist(), _rows(store, "words").lookup(rows)


def _check_options(options: Options, metadata: Mapping[str, Any]) -> None:
    for name in _FIXED:
        given, held = getattr(options, name), metadata.get(name)
        if given != held:
            trained = f"{options.folder} was trained with {held}"
            raise _refusal(options, f"{name} is {given}, but {trained}; use that")


def _refusal(options: Options, reason: str) -> OptionError:
    return OptionError(f"{reason}, choose another folder, or delete {options.folder}")


# ---- what a person sees


class _Meter:
    """Counts what happens from one commit to the next."""

    def __init__(self, store: shardemb.Store) -> None:
        self._store, self._start = store, time.perf_counter()
        self._pairs = self._rows = 0
        self._loss = 0.0

    def add(self, batch: corpus.Batch, loss: float) -> None:
        self._loss += loss
        self._pairs += batch.pairs
        self._rows += 2 * (batch.words.size + batch.contexts.size)  # looked up, then updated

    @property
    def loss(self) -> float:
        return self._loss / self._pairs

    def __str__(self) -> str:
        rows = self._rows / (time.perf_counter() - self._start)
        written = size(self._store.stats()["bytes_written"])
        return f"loss {self.loss:.3f}   {rows / 1e6:.2f} M rows/s   {written} written"


def _show(options: Options, result: Result, console: Console) -> None:
    _say(console, "\nNearest neighbours, by the angle between the vectors:")
    for word, neighbours in result.neighbours.items():
        _say(console, f"  {word:<10} {', '.join(neighbours)}")
    _say(console, f"\n{options.store}: {size(result.bytes_on_disk)} on disk, {result.steps:,} steps")
    _say(console, f"{options.parquet}: the words and their vectors")


def _say(console: Console, text: str) -> None:
    # Plain text, because a file name may look like markup; unwrapped, because a wrapped line is hard to copy.
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _saved(options: Options) -> str:
    try:
        with shardemb.open(options.store, mode="r") as store:
            last = store.last_commit
    except shardemb.StoreNotFoundError:
        last = None
    return f"Step {last.step:,} is saved in {options.folder}." if last else "Nothing was saved yet."
