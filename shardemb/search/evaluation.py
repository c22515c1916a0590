"""How well the vectors of words answer analogies and agree with people's judgements, as gensim measures it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from shardemb.base.paths import local_path
from shardemb.search import words
from shardemb.search.candidates import Excluded
from shardemb.search.correlation import Correlation, pearson, spearman
from shardemb.search.exact import find
from shardemb.search.metrics import Cosine
from shardemb.vocabulary.key_rows import read_steadily

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.vocabulary.keyed_rows import KeyedRows

    Lines: TypeAlias = str | os.PathLike[str] | Iterable[str]

GUESSES = 5
"""Answers of an analogy of which the first that is none of its words counts."""

_log = logging.getLogger("shardemb")

Analogy = tuple[str, str, str, str]


class Section(TypedDict):
    """The analogies of a section, right and wrong."""

    section: str
    correct: list[Analogy]
    incorrect: list[Analogy]


class KnownWords(NamedTuple):
    """The first words of a vocabulary: all in upper case if case does not matter; of equal ones the first counts."""

    rows: dict[str, int]
    upper: bool

    @classmethod
    def of(cls, keyed: KeyedRows, first: int | None, *, upper: bool) -> KnownWords:
        """Read the first keys, all of them without a limit.

        Raises
        ------
        TypeError
            The keys are not strings.
        """
        if keyed.keys.key_type != "string":
            msg = f"table {keyed.table.name!r} has {keyed.keys.key_type} keys; words are looked up among strings"
            raise TypeError(msg)
        entry = keyed.keys.entry
        rows = keyed.keys.live_rows(entry.reserved, entry.rows)[:first]
        keys = keyed.keys.keys_of(rows).tolist()
        pairs = zip(reversed(keys), reversed(rows.tolist()), strict=True)
        return cls({key.upper() if upper else key: row for key, row in pairs}, upper)

    def split(self, line: str, delimiter: str | None = None) -> list[str]:
        """Split a line into words."""
        return (line.upper() if self.upper else line).split(delimiter)


def _lines(given: Lines, what: str) -> Iterator[str]:
    """Yield the lines of a text file in UTF-8, or those that are given."""
    if not isinstance(given, str | bytes | os.PathLike) and isinstance(given, Iterable):
        yield from given
        return
    with open(local_path(given, what), encoding="utf-8-sig") as file:
        yield from file


# ---- analogies ----------------------------------------------------------------------------------------------------


def analogies(
    keyed: KeyedRows, given: Lines, first: int | None, *, upper: bool, unknown_is_wrong: bool
) -> tuple[float, list[dict[str, Any]]]:
    """Answer analogies, all of them in one pass; see `KeyedTable.evaluate_word_analogies`."""
    lines = list(_lines(given, "a file of analogies"))

    def answer() -> tuple[float, list[dict[str, Any]]]:
        known = KnownWords.of(keyed, first, upper=upper)
        sections, asked = _sections(lines, known, unknown_is_wrong=unknown_is_wrong)
        guessed = _guesses(keyed, known, [each for each, _ in asked], first)
        for (analogy, section), guess in zip(asked, guessed, strict=True):
            section["correct" if guess == analogy[3] else "incorrect"].append(analogy)
        total = Section(section="Total accuracy", correct=[], incorrect=[])
        for section in sections:
            total["correct"] += section["correct"]
            total["incorrect"] += section["incorrect"]
        return _accuracy(total), [dict(each) for each in (*sections, total)]

    return read_steadily([keyed.keys], answer)


def _sections(
    lines: list[str], known: KnownWords, *, unknown_is_wrong: bool
) -> tuple[list[Section], list[tuple[Analogy, Section]]]:
    """Parse lines; return their sections, and the analogies that can be asked with the section of each."""
    sections: list[Section] = []
    asked: list[tuple[Analogy, Section]] = []
    for number, line in enumerate(lines):
        if line.startswith(": "):
            sections.append(Section(section=line.lstrip(": ").strip(), correct=[], incorrect=[]))
            continue
        if not sections:
            msg = f"line {number} of the analogies comes before any section; begin with a line ': NAME'"
            raise ValueError(msg)
        parts = known.split(line)
        if len(parts) != 4:
            _log.info("line %d of the analogies has no four words, and is skipped", number)
            continue
        analogy: Analogy = (parts[0], parts[1], parts[2], parts[3])
        if all(word in known.rows for word in analogy):
            asked.append((analogy, sections[-1]))
        elif unknown_is_wrong:
            sections[-1]["incorrect"].append(analogy)
    return sections, asked


def _guesses(
    keyed: KeyedRows, known: KnownWords, asked: list[Analogy], first: int | None
) -> Iterator[str | None]:
    """Guess the last word of each analogy: the nearest to the second and third less the first."""
    rows = np.array([[known.rows[word] for word in each[:3]] for each in asked], np.int64).reshape(-1, 3)
    distinct, places = np.unique(rows, return_inverse=True)
    units = words.unit_vectors(keyed, distinct)
    a, b, c = np.moveaxis(units[places.reshape(-1, 3)], 1, 0)
    queries = (b + c - a).astype(np.float32)
    queries[~queries.any(axis=1)] = 1  # of no direction, so any answer is as good
    found = find(
        keyed.table,
        Cosine.of(queries),
        GUESSES,
        words.written(keyed, words.every_key(keyed, 0, first)),
        Excluded.by_query(_distinct(rows)),
    )
    for analogy, ids in zip(asked, found.ids, strict=True):
        yield _guess(keyed.keys.keys_of(ids[ids >= 0]), analogy, known)


def _distinct(rows: Int64Array) -> Iterator[Int64Array]:
    return (np.unique(each) for each in rows)


def _guess(keys: NDArray[Any], analogy: Analogy, known: KnownWords) -> str | None:
    guess = None
    for key in keys.tolist():
        guess = key.upper() if known.upper else key
        if guess not in analogy[:3]:
            break
    return guess


def _accuracy(section: Section) -> float:
    right, wrong = len(section["correct"]), len(section["incorrect"])
    return right / (right + wrong) if right + wrong else 0.0


# ---- judgements ---------------------------------------------------------------------------------------------------


def pairs(
    keyed: KeyedRows,
    given: Lines,
    delimiter: str,
    first: int | None,
    *,
    upper: bool,
    unknown_is_wrong: bool,
) -> tuple[Correlation, Correlation, float]:
    """Compare similarities of words with people's; see `KeyedTable.evaluate_word_pairs`."""
    lines = list(_lines(given, "a file of pairs of words"))

    def compare() -> tuple[Correlation, Correlation, float]:
        known = KnownWords.of(keyed, first, upper=upper)
        judged = list(_judgements(lines, delimiter, known))
        is_known = np.array([a in known.rows and b in known.rows for a, b, _ in judged], np.bool_)
        rows = np.array(
            [[known.rows[a], known.rows[b]] for (a, b, _), one in zip(judged, is_known, strict=True) if one],
            np.int64,
        ).reshape(-1, 2)
        similarities = np.zeros(len(judged))
        one, other = words.unit_vectors(keyed, rows[:, 0]), words.unit_vectors(keyed, rows[:, 1])
        similarities[is_known] = (one * other).sum(axis=1)
        used = np.ones_like(is_known) if unknown_is_wrong else is_known
        if not used.any():
            msg = f"table {keyed.table.name!r}: no line has two known words and a number, {delimiter!r} between them"
            raise ValueError(msg)
        people, ours = np.array([each for *_, each in judged])[used].tolist(), similarities[used].tolist()
        unknown = 100 * float(np.mean(~is_known))
        return pearson(people, ours), spearman(people, ours), unknown

    return read_steadily([keyed.keys], compare)


def _judgements(lines: list[str], delimiter: str, known: KnownWords) -> Iterator[tuple[str, str, float]]:
    """Yield two words and a number for each line that has these."""
    for number, line in enumerate(lines):
        if line.startswith("#"):
            continue
        try:
            a, b, judgement = known.split(line, delimiter)
            yield a, b, float(judgement)
        except ValueError:
            _log.info("line %d of the pairs is skipped: no two words and a number", number)
