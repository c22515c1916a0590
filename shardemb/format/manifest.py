"""What a commit says about everything but the rows.

A `TableEntry` is what a commit can change about a table (its name, its step count, the optimizer's
hyper-parameters); a `Manifest` holds those of all tables together with the commit they belong to. Every commit record
of the log carries one, and the file ``manifest.json``, always replaced whole, is the *base*: the shards hold
everything up to its commit, and the log is replayed from its segment.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
from shardemb.format.spec import BYTES, INTERNAL, KEY_TYPES, SKETCH, check_stored_name

MAX_DEPTH = 64
"""Levels of a commit's metadata, so that it can be read back from any depth of the reader's stack."""


@dataclass(frozen=True)
class Commit:
    """One durable instant of a store.

    Attributes
    ----------
    id : int
        1 for the first commit of a store, then counting up.
    step : int
        The job's own step, as given to `Store.commit`.
    metadata : dict
        The job's own small JSON, as given to `Store.commit`.
    """

    id: int
    step: int
    metadata: dict[str, Any]


@dataclass(frozen=True)
class TableEntry:
    """What a commit says about one table.

    Attributes
    ----------
    uuid, name : str
        Which table, and what it is called since this commit.
    step : int
        Number of updates so far.
    optimizer : Optimizer or None
        Hyper-parameters as of this commit.
    vocabulary : str or None
        The uuid of the vocabulary that gives out its rows.
    """

    uuid: str
    name: str
    step: int
    optimizer: optim.Optimizer | None
    vocabulary: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON values."""
        bound = {} if self.vocabulary is None else {"vocabulary": self.vocabulary}
        return {
            "uuid": self.uuid,
            "name": self.name,
            "step": self.step,
            "optimizer": serialization.to_json(self.optimizer) if self.optimizer else None,
        } | bound


@dataclass(frozen=True)
class VocabularyEntry:
    """What a commit says about one vocabulary; its keys lie in tables.

    Attributes
    ----------
    uuid, name : str
    key_type : {"int64", "string", "bytes"}
    reserved : int
        Rows at the beginning that no key gets.
    admission : Admission or None
        When a key earns its row; None: at once.
    rows : int
        Rows given out so far, reserved and freed ones included.
    head, tail : int
        How many freed rows were given out again, and how many rows were ever freed.
    text_bytes : int
        Bytes of keys in ``@bytes``, those of freed rows included.
    sightings : int
        How often keys were counted that had no row.
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
    def parts(self) -> tuple[str, ...]:
        """What its tables are for, each called ``NAME@part``."""
        has = {BYTES: self.key_type != "int64", SKETCH: self.admission is not None}
        return tuple(part for part in INTERNAL if has.get(part, True))

    def to_json(self) -> dict[str, object]:
        """Return the record as JSON values."""
        return vars(self) | {"admission": serialization.to_json(self.admission) if self.admission else None}

    @staticmethod
    def from_json(document: object) -> VocabularyEntry:
        """Read what `to_json` wrote, believing nothing.

        Raises
        ------
        FormatError
            A missing or impossible value.
        """
        if not isinstance(document, dict):
            msg = f"a vocabulary's record is {document!r}"
            raise FormatError(msg)
        admission = field(document, "admission", (dict, type(None)))
        counts = ("reserved", "rows", "head", "tail", "text_bytes", "sightings")
        record = VocabularyEntry(
            uuid=uuid_field(document),
            name=check_stored_name(document.get("name")),
            key_type=field(document, "key_type", str),
            admission=None
            if admission is None
            else serialization.from_json("admission", ADMISSIONS, admission),
            **{name: int_field(document, name, 2**62, minimum=0) for name in counts},
        )
        if (
            record.key_type not in KEY_TYPES
            or not record.head <= record.tail
            or record.reserved > record.rows
        ):
            msg = f"the record of vocabulary {record.name!r} cannot be: {document}"
            raise FormatError(msg)
        return record


def new_entry(name: str, key_type: object, admission: object, reserved: object) -> VocabularyEntry:
    """Make the record of a vocabulary of a checked name that has no key yet.

    Raises
    ------
    TypeError, ValueError
        A type, admission or number that cannot be.
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
class Manifest:
    """What the files of a store mean: the last commit and every table as of it.

    Attributes
    ----------
    uuid : str
        Identity of the store.
    epoch : int
        Number of times that the store was opened for writing.
    clean : bool
        Whether the last writer closed it: then there is no log, and only then may a shard be missing because zarr
        deleted it.
    segment, sequence, attempt : int
        Where the log begins: the first segment, the number of its first record, and the lowest number of an attempt
        to commit. None of them ever starts again.
    commit : Commit or None
        None before the first.
    tables : tuple of TableEntry
        The tables of that commit.
    vocabularies : tuple of VocabularyEntry
        Its vocabularies.
    dropped : tuple of TableEntry
        Tables of the commit before that this one dropped, and whose folders may still be there.
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

    def vocabulary(self, identity: str) -> VocabularyEntry | None:
        """Return what is said about the vocabulary of a uuid."""
        return self._vocabularies_by_uuid.get(identity)

    @cached_property
    def _vocabularies_by_uuid(self) -> dict[str, VocabularyEntry]:
        return {entry.uuid: entry for entry in self.vocabularies}

    def to_bytes(self) -> bytes:
        """Serialise, with a checksum over everything else."""
        document: dict[str, object] = {
            "format_version": FORMAT_VERSION,
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
        document["crc32"] = crc32(document)
        return json.dumps(document).encode() + b"\n"

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Read what `to_bytes` wrote, believing nothing.

        Raises
        ------
        FormatError
            Not JSON, a newer version, a wrong checksum, a missing or impossible value.
        """
        document = parse_json(data)
        require_version(document)
        if document.get("crc32") != crc32(document):
            msg = "its checksum does not match its content"
            raise FormatError(msg)
        commit = field(document, "commit", (dict, type(None)))
        tables = tuple(_entry_from_json(entry) for entry in field(document, "tables", list))
        records = field(document, "vocabularies", list) if "vocabularies" in document else []
        vocabularies = tuple(VocabularyEntry.from_json(record) for record in records)
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
        )


def check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check a commit's metadata and return a copy that nobody else holds.

    Raises
    ------
    TypeError
        Not a mapping of strings to JSON values.
    ValueError
        Larger than 1 MiB as JSON, nested deeper than `MAX_DEPTH`, or holding NaN or infinity.
    """
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        msg = f"commit: metadata must be a dict with str keys, got {metadata!r:.200}"
        raise TypeError(msg)
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except TypeError as error:
        msg = f"commit: metadata must be a dict of JSON values: {error}"
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


def _depth(value: object) -> int:
    """Count the levels of containers within a JSON value that is known to end."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, Mapping | list | tuple)]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, Mapping) else each)]
    return depth


def _check_together(tables: tuple[TableEntry, ...], vocabularies: tuple[VocabularyEntry, ...]) -> None:
    """Raise `FormatError` if records of a commit cannot be those of one store."""
    for kind, records in ("tables", tables), ("vocabularies", vocabularies):
        for what in ("name", "uuid"):
            if len({getattr(record, what) for record in records}) < len(records):
                msg = f"two {kind} have the same {what}"
                raise FormatError(msg)
    names, known = {table.name for table in tables}, {each.uuid for each in vocabularies}
    missing = [
        name for each in vocabularies for part in each.parts if (name := f"{each.name}@{part}") not in names
    ]
    missing += [f"the vocabulary of {each.name}" for each in tables if each.vocabulary not in {None, *known}]
    if missing:
        msg = f"{missing[0]} is missing"
        raise FormatError(msg)


def _commit_from_json(document: Mapping[str, Any]) -> Commit:
    return Commit(
        id=int_field(document, "id", 2**62),
        step=int_field(document, "step", 2**62, minimum=0),
        metadata=field(document, "metadata", dict),
    )


def _entry_from_json(document: object) -> TableEntry:
    if not isinstance(document, dict):
        msg = f"a table's record is {document!r}"
        raise FormatError(msg)
    optimizer = field(document, "optimizer", (dict, type(None)))
    return TableEntry(
        uuid=uuid_field(document),
        name=check_stored_name(document.get("name")),
        step=int_field(document, "step", 2**62, minimum=0),
        optimizer=None if optimizer is None else optim.from_json(optimizer),
        vocabulary=uuid_field(document, "vocabulary") if "vocabulary" in document else None,
    )
