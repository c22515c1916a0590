"""What a commit holds besides rows: the state of every table and vocabulary, and where the log begins.

A `TableEntry` is what a commit can change about a table: its name, its step count, the optimizer's hyper-parameters. A
`Manifest` holds the entries of all tables together with the commit that they belong to. Every commit record of the log
contains a manifest. The one in the file ``manifest.json``, which is always replaced as a whole, is the *base*: the
shards hold everything up to its commit, and replay of the log begins at its segment.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from shardemb import optim
from shardemb.admission import ADMISSIONS, Admission
from shardemb.base import serialization, validation
from shardemb.errors import FormatError
from shardemb.format.documents import (
    FORMAT_VERSION,
    crc32,
    field,
    int_field,
    parse_json,
    require_version,
    uuid_field,
)
from shardemb.format.spec import BYTES, INTERNAL, KEY_TYPES, MAX_ROWS, SKETCH, check_stored_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardemb.format.ranges import Ranges

T = TypeVar("T")

TAGGED_VERSION, PARTITION_VERSION = 2, 3
"""Versions of the manifest of a store with tags, and of a partition, with or without tags.

A writer of version 1 would overwrite what tags keep, and one of version 2 would commit a partition without the others.
"""

MAX_DEPTH = 64
"""Most levels of a commit's metadata, so that a reader can parse it however deep its own stack is."""

MAX_STEP = 2**63 - 1
"""Largest step of a commit: nanoseconds since 1970 fit, and so does whatever NumPy counts with."""


@dataclass(frozen=True)
class Commit:
    """One durable state of a store.

    Attributes
    ----------
    id : int
        1 for the first commit of a store, and one more for each further commit.
    step : int
        The training job's step, as given to `Store.commit`.
    metadata : dict
        The training job's own small JSON, as given to `Store.commit`.
    """

    id: int
    step: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class TableEntry:
    """What a commit records about one table.

    Attributes
    ----------
    uuid, name : str
        Identity of the table, and its name as of this commit.
    step : int
        Number of updates of the table so far.
    optimizer : Optimizer or None
        Hyper-parameters as of this commit.
    vocabulary : str or None
        The uuid of the vocabulary that assigns its rows, if it has one.
    frozen : tuple of (int, int)
        The ranges of rows that no update changes, see `ranges`.
    """

    uuid: str
    name: str
    step: int
    optimizer: optim.Optimizer | None
    vocabulary: str | None = None
    frozen: Ranges = ()

    def to_json(self) -> dict[str, object]:
        """Return the entry as JSON values."""
        bound: dict[str, object] = {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        if self.frozen:
            bound["frozen"] = [list(each) for each in self.frozen]
        return {
            "uuid": self.uuid,
            "name": self.name,
            "step": self.step,
            "optimizer": optim.to_json(self.optimizer) if self.optimizer else None,
        } | bound


@dataclass(frozen=True)
class VocabularyEntry:
    """What a commit records about one vocabulary. Its keys are in internal tables.

    Attributes
    ----------
    uuid, name : str
    key_type : {"int64", "string", "bytes"}
    reserved : int
        Number of rows at the beginning that are never assigned to a key.
    admission : Admission or None
        When a key earns its row; None means at its first occurrence.
    rows : int
        Number of rows assigned so far, including reserved and freed ones.
    head, tail : int
        How many freed rows were assigned again, and how many rows were ever freed.
    text_bytes : int
        Bytes of keys in ``@bytes``, including those of freed rows.
    sightings : int
        How many occurrences of keys without a row were counted.
    """

    uuid: str
    name: str
    key_type: str
    reserved: int = 0
    admission: Admission | None = None
    rows: int = 0
    head: int = 0
    tail: int = 0
    text_bytes: int = 0
    sightings: int = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """What tells which keys have which rows: it changes whenever a key gets or loses its row."""
        return self.rows, self.head, self.tail

    @property
    def table_kinds(self) -> tuple[str, ...]:
        """The kinds of its internal tables, each named ``NAME@kind``."""
        has = {BYTES: self.key_type != "int64", SKETCH: self.admission is not None}
        return tuple(kind for kind in INTERNAL if has.get(kind, True))

    def to_json(self) -> dict[str, object]:
        """Return the entry as JSON values."""
        return vars(self) | {"admission": serialization.to_json(self.admission) if self.admission else None}

    @staticmethod
    def from_json(document: object) -> VocabularyEntry:
        """Read what `to_json` wrote, trusting none of it.

        Raises
        ------
        FormatError
            A value is missing or impossible.
        """
        if not isinstance(document, dict):
            msg = f"a vocabulary's entry is {document!r}"
            raise FormatError(msg)
        admission = field(document, "admission", (dict, type(None)))
        counts = ("reserved", "rows", "head", "tail", "text_bytes", "sightings")
        entry = VocabularyEntry(
            uuid=uuid_field(document),
            name=check_stored_name(document.get("name")),
            key_type=field(document, "key_type", str),
            admission=None
            if admission is None
            else serialization.from_json("admission", ADMISSIONS, admission),
            **{name: int_field(document, name, 2**62, minimum=0) for name in counts},
        )
        if entry.key_type not in KEY_TYPES or not entry.head <= entry.tail or entry.reserved > entry.rows:
            msg = f"the entry of vocabulary {entry.name!r} is impossible: {document}"
            raise FormatError(msg)
        return entry


def new_entry(name: str, key_type: object, admission: object, reserved: object) -> VocabularyEntry:
    """Make the entry of a new vocabulary, without keys, from a name that was checked already.

    Raises
    ------
    TypeError, ValueError
        The key type, the admission or the number of reserved rows is invalid.
    """
    if key_type not in KEY_TYPES:
        msg = f"key_type must be one of {', '.join(map(repr, KEY_TYPES))}, got {key_type!r}"
        raise ValueError(msg)
    if not isinstance(admission, Admission | None):
        msg = f"admission must be a shardemb.Admission, for example shardemb.Admission(after=3), got {admission!r}"
        raise TypeError(msg)
    rows = validation.count(reserved, "reserved", minimum=0, maximum=2**31)
    return VocabularyEntry(
        str(uuid.uuid4()), name, str(key_type), reserved=rows, admission=admission, rows=rows
    )


@dataclass(frozen=True)
class TagEntry:
    """A tag: the name under which a commit is kept.

    Attributes
    ----------
    name : str
    uuid : str
        Identity of the tag, and name of its folder.
    """

    name: str
    uuid: str


AttemptId: TypeAlias = tuple[int, str, int]
"""An attempt to commit all partitions of a store: the coordinator's epoch, its name, and a number. They are ordered."""

Decided: TypeAlias = tuple[int, AttemptId | None]
"""What was decided for all partitions: number and attempt of the last commit; ``(0, None)`` before the first."""

MAX_PARTITIONS = 2**16
"""Numbers of partitions are sorted as 16 bits, for which NumPy has a radix sort."""


def checked_attempt(attempt: object) -> AttemptId:
    """Return an attempt as a tuple.

    Raises
    ------
    TypeError, ValueError
        It is not an epoch, a name and a number.

    Examples
    --------
    >>> checked_attempt([1, "head", 7])
    (1, 'head', 7)
    """
    if not isinstance(attempt, list | tuple) or len(attempt) != 3 or not isinstance(attempt[1], str):
        msg = f"an attempt is (epoch, name of the coordinator, number), got {attempt!r}"
        raise TypeError(msg)
    epoch, coordinator, number = attempt
    epoch = validation.count(epoch, "epoch", minimum=0, maximum=2**62)
    return epoch, coordinator, validation.count(number, "number", minimum=0, maximum=2**62)


def checked_decided(decided: object) -> Decided:
    """Return the number of a commit and its attempt as tuples.

    Raises
    ------
    TypeError, ValueError
        They are not that.

    Examples
    --------
    >>> checked_decided([2, [1, "head", 7]])
    (2, (1, 'head', 7))
    """
    if not isinstance(decided, list | tuple) or len(decided) != 2:
        msg = f"what is decided is (number of the commit, attempt), got {decided!r}"
        raise TypeError(msg)
    number, attempt = decided
    number = validation.count(number, "commit", minimum=0, maximum=2**62)
    return number, None if attempt is None else checked_attempt(attempt)


@dataclass(frozen=True)
class PartitionIdentity:
    """Which part of a distributed store a store is. A row with id ``i`` is in partition ``i % count``.

    Attributes
    ----------
    head : str
        The uuid of the distributed store's head.
    number, count : int
        It is partition `number`, from 0 on, of `count`.

    Raises
    ------
    TypeError, ValueError
        The uuid is none, or a number is out of range.

    Examples
    --------
    >>> print(PartitionIdentity("0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11", number=3, count=16))
    partition 3 of 16 of the store 0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11
    """

    head: str
    number: int
    count: int

    def __post_init__(self) -> None:
        uuid_field({"uuid": self.head})
        count = validation.count(self.count, "count", maximum=MAX_PARTITIONS)
        validation.count(self.number, "number", minimum=0, maximum=count - 1)

    def __str__(self) -> str:
        return f"partition {self.number} of {self.count} of the store {self.head}"


@dataclass(frozen=True)
class Manifest:
    """What the files of a store mean: the last commit, and every table as of that commit.

    Attributes
    ----------
    uuid : str
        Identity of the store.
    epoch : int
        How many times the store was opened for writing.
    clean : bool
        Whether the last writer closed the store. If so there is no log; and only then may a shard be missing, because
        zarr deletes chunks of zeros.
    segment, sequence, attempt : int
        Where the log begins: its first segment, the number of the first record in it, and the lowest number that no
        attempt to commit has used. None of the three is ever reset.
    commit : Commit or None
        None before the first commit.
    tables : tuple of TableEntry
        The tables of that commit.
    vocabularies : tuple of VocabularyEntry
        The vocabularies of that commit.
    dropped : tuple of TableEntry
        Tables of the previous commit that this one dropped. Their folders may still exist.
    tags : tuple of TagEntry
        The tags of the store, in a base; none in a commit record, because they are not part of a commit.
    partition : PartitionIdentity or None
        Which part of a distributed store this is.
    decision : (int, str, int) or None
        In a partition: the attempt of all partitions that made the last commit.
    resolved : (int, (int, str, int)) or None
        In a base: what was decided for all partitions when the log ended with something prepared, which is committed
        if it is that, and dropped otherwise.
    """

    uuid: str
    epoch: int = 0
    clean: bool = False
    segment: int = 1
    sequence: int = 1
    attempt: int = 1
    commit: Commit | None = None
    tables: tuple[TableEntry, ...] = ()
    vocabularies: tuple[VocabularyEntry, ...] = ()
    dropped: tuple[TableEntry, ...] = ()
    tags: tuple[TagEntry, ...] = ()
    partition: PartitionIdentity | None = None
    decision: AttemptId | None = None
    resolved: Decided | None = None

    @property
    def decided(self) -> Decided:
        """The number of its commit, and the attempt that made it."""
        return (self.commit.id if self.commit else 0, self.decision)

    def vocabulary(self, identity: str) -> VocabularyEntry | None:
        """Return the entry of the vocabulary with a uuid; None if there is none."""
        return self._vocabularies_by_uuid.get(identity)

    @cached_property
    def _vocabularies_by_uuid(self) -> dict[str, VocabularyEntry]:
        return {entry.uuid: entry for entry in self.vocabularies}

    def to_bytes(self) -> bytes:
        """Serialize, with a checksum over everything else."""
        document: dict[str, object] = {
            "format_version": self._version,
            "uuid": self.uuid,
            "epoch": self.epoch,
            "clean": self.clean,
            "segment": self.segment,
            "sequence": self.sequence,
            "attempt": self.attempt,
            "commit": None if self.commit is None else vars(self.commit),
            "tables": [table.to_json() for table in self.tables],
            "dropped": [table.to_json() for table in self.dropped],
        }
        if self.vocabularies:
            document["vocabularies"] = [each.to_json() for each in self.vocabularies]
        if self.tags:
            document["tags"] = [vars(each) for each in self.tags]
        if self.partition is not None:
            document["partition"] = vars(self.partition)
            document["decision"] = self.decision
            document["resolved"] = self.resolved
        document["crc32"] = crc32(document)
        return json.dumps(document).encode() + b"\n"

    @property
    def _version(self) -> int:
        if self.partition is not None:
            return PARTITION_VERSION
        return TAGGED_VERSION if self.tags else FORMAT_VERSION

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Read what `to_bytes` wrote, trusting none of it.

        Raises
        ------
        FormatError
            The data is not JSON, the version is newer, the checksum is wrong, or a value is missing or impossible.
        """
        document = parse_json(data)
        version = require_version(document, PARTITION_VERSION)
        is_partition = version == PARTITION_VERSION
        if document.get("crc32") != crc32(document):
            msg = "its checksum does not match its content"
            raise FormatError(msg)
        commit = field(document, "commit", (dict, type(None)))
        tables = tuple(_entry_from_json(entry) for entry in field(document, "tables", list))
        entries = field(document, "vocabularies", list) if "vocabularies" in document else []
        vocabularies = tuple(VocabularyEntry.from_json(entry) for entry in entries)
        _check_together(tables, vocabularies)
        return Manifest(
            uuid=uuid_field(document),
            epoch=int_field(document, "epoch", 2**62, minimum=0),
            clean=field(document, "clean", bool),
            segment=int_field(document, "segment", 2**62),
            sequence=int_field(document, "sequence", 2**62),
            attempt=int_field(document, "attempt", 2**62),
            commit=None if commit is None else _commit_from_json(commit),
            tables=tables,
            vocabularies=vocabularies,
            dropped=tuple(_entry_from_json(entry) for entry in field(document, "dropped", list)),
            tags=_tags_from_json(document) if version == TAGGED_VERSION or "tags" in document else (),
            partition=_partition_from_json(document) if is_partition else None,
            decision=_decided_from_json(document, "decision", checked_attempt) if is_partition else None,
            resolved=_decided_from_json(document, "resolved", checked_decided) if is_partition else None,
        )


def check_step(step: int | None) -> int | None:
    """Return a commit's step as an int, if one was given, or raise `TypeError` or `ValueError`."""
    return None if step is None else validation.count(step, "step", minimum=0, maximum=MAX_STEP)


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check a commit's metadata and return a deep copy of it, in which NumPy's scalars are Python's.

    Raises
    ------
    TypeError
        The metadata is not a mapping of strings to JSON values.
    ValueError
        The metadata is larger than 1 MiB as JSON, nested deeper than `MAX_DEPTH`, or contains NaN or infinity.
    """
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        msg = f"commit: metadata must be a dict with str keys, got {metadata!r:.200}"
        raise TypeError(msg)
    try:
        text = json.dumps(dict(metadata), allow_nan=False, default=_python_scalar)
    except TypeError as error:
        msg = f"commit: metadata must be a dict of JSON values: {error}{_place_of_foreign(metadata)}"
        raise TypeError(msg) from error
    except (ValueError, RecursionError) as error:
        msg = f"commit: metadata cannot be written as JSON: {error}"
        raise ValueError(msg) from error
    if len(text) > 2**20:
        msg = f"commit: metadata takes {len(text)} bytes as JSON, more than 1 MiB; keep bulk data in a table or a file"
        raise ValueError(msg)
    if _depth(metadata) > MAX_DEPTH:
        msg = f"commit: metadata is nested deeper than {MAX_DEPTH} levels"
        raise ValueError(msg)
    copy: dict[str, Any] = json.loads(text)
    return copy


def _python_scalar(value: object) -> bool | int | float:
    """Return a NumPy scalar as Python has it, if that loses no bit. `json.dumps` passes all that it cannot write."""
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.itemsize <= 8:
        scalar: bool | int | float = value.item()
        return scalar
    msg = f"an object of type {type(value).__name__} is none; convert it first, for example with .tolist() or str()"
    raise TypeError(msg)


def _place_of_foreign(metadata: Mapping[str, Any]) -> str:
    """Say for a message where in metadata the first value is that JSON does not have."""
    level: list[tuple[str, Any]] = [("metadata", metadata)]
    for _ in range(MAX_DEPTH):
        inner: list[tuple[str, Any]] = []
        for place, value in level:
            if isinstance(value, dict | list | tuple) or value is metadata:
                items = enumerate(value) if isinstance(value, list | tuple) else value.items()
                inner += [(f"{place}[{key!r}]", each) for key, each in items]
                continue
            try:
                json.dumps(value, default=_python_scalar)
            except TypeError:
                return f" (at {place})"
        level = inner
    return ""


def _depth(value: object) -> int:
    """Count the levels of containers in a JSON value, which must not contain itself."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, Mapping | list | tuple)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, Mapping) else each)]
    return depth


def _check_together(tables: tuple[TableEntry, ...], vocabularies: tuple[VocabularyEntry, ...]) -> None:
    """Raise `FormatError` if the entries of a commit contradict each other."""
    for kind, entries in ("tables", tables), ("vocabularies", vocabularies):
        for what in ("name", "uuid"):
            if len({getattr(entry, what) for entry in entries}) < len(entries):
                msg = f"two {kind} have the same {what}"
                raise FormatError(msg)
    names, known = {table.name for table in tables}, {each.uuid for each in vocabularies}
    missing = [
        name
        for each in vocabularies
        for kind in each.table_kinds
        if (name := f"{each.name}@{kind}") not in names
    ]
    missing += [f"the vocabulary of {each.name}" for each in tables if each.vocabulary not in {None, *known}]
    if missing:
        msg = f"{missing[0]} is missing"
        raise FormatError(msg)


def _tags_from_json(document: Mapping[str, Any]) -> tuple[TagEntry, ...]:
    found = []
    for each in field(document, "tags", list):
        if not isinstance(each, dict):
            msg = f"a tag's entry is {each!r}"
            raise FormatError(msg)
        found.append(TagEntry(check_stored_name(each.get("name")), uuid_field(each)))
    if len({each.name for each in found}) < len(found) or len({each.uuid for each in found}) < len(found):
        msg = "two tags have the same name or uuid"
        raise FormatError(msg)
    return tuple(found)


def _partition_from_json(document: Mapping[str, Any]) -> PartitionIdentity:
    found = field(document, "partition", dict)
    count = int_field(found, "count", MAX_PARTITIONS)
    return PartitionIdentity(
        uuid_field(found, "head"), int_field(found, "number", count - 1, minimum=0), count
    )


def _decided_from_json(document: Mapping[str, Any], name: str, check: Callable[[object], T]) -> T | None:
    found = field(document, name, (list, type(None)))
    try:
        return None if found is None else check(found)
    except (TypeError, ValueError) as error:
        msg = f"{name} is {found!r}: {error}"
        raise FormatError(msg) from error


def _commit_from_json(document: Mapping[str, Any]) -> Commit:
    return Commit(
        id=int_field(document, "id", 2**62),
        step=int_field(document, "step", MAX_STEP, minimum=0),
        metadata=field(document, "metadata", dict),
    )


def _entry_from_json(document: object) -> TableEntry:
    if not isinstance(document, dict):
        msg = f"a table's entry is {document!r}"
        raise FormatError(msg)
    optimizer = field(document, "optimizer", (dict, type(None)))
    return TableEntry(
        uuid=uuid_field(document),
        name=check_stored_name(document.get("name")),
        step=int_field(document, "step", 2**62, minimum=0),
        optimizer=None if optimizer is None else optim.from_json(optimizer),
        vocabulary=uuid_field(document, "vocabulary") if "vocabulary" in document else None,
        frozen=_frozen(document) if "frozen" in document else (),
    )


def _frozen(document: Mapping[str, Any]) -> Ranges:
    """Return the frozen ranges of a table's entry, trusting none of them."""
    found: Ranges = ()
    for each in field(document, "frozen", list):
        if not isinstance(each, list) or len(each) != 2:
            msg = f"frozen has {each!r}, which is no range of rows"
            raise FormatError(msg)
        start, stop = (int_field({"row": row}, "row", MAX_ROWS, minimum=0) for row in each)
        if start >= stop or (found and found[-1][1] >= start):
            msg = f"frozen is {document['frozen']!r}, which are no ascending ranges of rows"
            raise FormatError(msg)
        found = (*found, (start, stop))
    return found
