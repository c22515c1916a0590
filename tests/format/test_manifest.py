import contextlib
import dataclasses
import json
import math
import sys
import zlib
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.references import damaged, damaged_bytes

from shardemb.errors import FormatError
from shardemb.format.manifest import (
    Commit,
    Manifest,
    PartitionIdentity,
    TableEntry,
    TagEntry,
    VocabularyEntry,
    check_metadata,
)
from shardemb.optim import Adam

A, B, C = (f"0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c{k:02d}" for k in range(3))

FULL = Manifest(
    uuid=A,
    epoch=3,
    clean=True,
    segment=4,
    sequence=5,
    attempt=6,
    commit=Commit(7, 100, {"loss": 0.25, "π": [1, None, {"a": "\ud800"}]}),
    tables=(TableEntry(B, "tokens", 5, Adam(lr=0.5)), TableEntry(C, "users", 0, None)),
    dropped=(TableEntry(A, "gone", 2, None),),
)


def sealed(document):
    """The bytes of a document with its right checksum."""
    document = {name: value for name, value in document.items() if name != "crc32"}
    crc = zlib.crc32(json.dumps(document, sort_keys=True).encode())
    return json.dumps(document | {"crc32": crc}).encode()


def full():
    return json.loads(FULL.to_bytes())


# ---- the file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", [FULL, Manifest(uuid=A)], ids=["full", "new"])
def test_a_manifest_survives_a_round_trip(manifest):
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_the_file_is_pinned():
    assert {name: value for name, value in full().items() if name != "commit"} == {
        "format_version": 1,
        "uuid": A,
        "epoch": 3,
        "clean": True,
        "segment": 4,
        "sequence": 5,
        "attempt": 6,
        "tables": [
            {
                "uuid": B,
                "name": "tokens",
                "step": 5,
                "optimizer": {"name": "Adam", "lr": 0.5, "betas": [0.9, 0.999], "eps": 1e-08},
            },
            {"uuid": C, "name": "users", "step": 0, "optimizer": None},
        ],
        "dropped": [{"uuid": A, "name": "gone", "step": 2, "optimizer": None}],
        "crc32": full()["crc32"],
    }
    assert full()["commit"] == {"id": 7, "step": 100, "metadata": FULL.commit.metadata}


def test_the_file_is_a_line_of_ascii():
    """Whatever the metadata holds, no byte depends on a locale."""
    text = FULL.to_bytes().decode("ascii")
    assert text.endswith("}\n")
    assert text.count("\n") == 1


def test_the_checksum_is_over_everything_else():
    assert sealed(full()) != b""
    assert json.loads(sealed(full())) == full()


@pytest.mark.parametrize("name", [name for name in json.loads(FULL.to_bytes()) if name != "crc32"])
def test_a_missing_field_is_a_format_error_even_if_the_checksum_is_right(name):
    document = full()
    del document[name]
    with pytest.raises(FormatError, match=name):
        Manifest.from_bytes(sealed(document))


@pytest.mark.parametrize("part", ["commit", "tables"])
def test_a_missing_field_of_a_part_is_a_format_error(part):
    names = full()["commit"] if part == "commit" else full()["tables"][0]
    for name in names:
        document = full()
        del (document["commit"] if part == "commit" else document["tables"][0])[name]
        with pytest.raises(FormatError):
            Manifest.from_bytes(sealed(document))


@pytest.mark.parametrize("crc", [None, 0, "", -1, full()["crc32"] + 1])
def test_a_wrong_checksum_is_a_format_error(crc):
    with pytest.raises(FormatError, match="checksum"):
        Manifest.from_bytes(json.dumps({**full(), "crc32": crc}).encode())


def test_a_missing_checksum_is_a_format_error():
    document = full()
    del document["crc32"]
    with pytest.raises(FormatError, match="checksum"):
        Manifest.from_bytes(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uuid", "../../x"),
        ("epoch", -1),
        ("epoch", 2**62 + 1),
        ("epoch", 1.0),
        ("clean", 1),
        ("commit", []),
        ("commit", {"id": 0, "step": 0, "metadata": {}}),
        ("commit", {"id": 1, "step": -1, "metadata": {}}),
        ("commit", {"id": 1, "step": 0, "metadata": []}),
        ("tables", {}),
        ("tables", [None]),
        ("tables", [{"uuid": B, "name": "../x", "step": 0, "optimizer": None}]),
        ("tables", [{"uuid": "../x", "name": "x", "step": 0, "optimizer": None}]),
        ("tables", [{"uuid": B, "name": "x", "step": -1, "optimizer": None}]),
        ("tables", [{"uuid": B, "name": "x", "step": 0, "optimizer": {}}]),
        ("dropped", None),
        ("dropped", [5]),
        ("dropped", [A]),
        ("dropped", [{"uuid": "../x", "name": "gone", "step": 2, "optimizer": None}]),
    ],
)
def test_an_impossible_value_is_a_format_error(name, value):
    with pytest.raises(FormatError):
        Manifest.from_bytes(sealed({**full(), name: value}))


@pytest.mark.parametrize("what", ["name", "uuid"])
def test_two_tables_cannot_share_a_name_or_a_uuid(what):
    document = full()
    document["tables"][1][what] = document["tables"][0][what]
    with pytest.raises(FormatError, match=f"same {what}"):
        Manifest.from_bytes(sealed(document))


def test_a_newer_version_asks_for_an_upgrade_whatever_else_the_document_holds():
    with pytest.raises(FormatError, match="format version 4 is newer"):
        Manifest.from_bytes(b'{"format_version": 4}')


def test_only_a_manifest_with_tags_has_version_2():
    tags = TagEntry("best", A), TagEntry("last", B)
    data = dataclasses.replace(FULL, tags=tags).to_bytes()
    assert json.loads(data)["format_version"] == 2
    assert Manifest.from_bytes(data).tags == tags
    assert json.loads(FULL.to_bytes())["format_version"] == 1
    for what in ("name", "uuid"):
        document = json.loads(data)
        document["tags"][1][what] = document["tags"][0][what]
        with pytest.raises(FormatError, match="two tags have the same"):
            Manifest.from_bytes(sealed(document))
    for wrong in ("x", [], {"name": "a/b", "uuid": FULL.uuid}, {"name": "a", "uuid": "../x"}):
        with pytest.raises(FormatError):
            Manifest.from_bytes(sealed({**json.loads(data), "tags": [wrong]}))


@settings(max_examples=500)
@given(damaged(json.loads(FULL.to_bytes())))
def test_a_damaged_manifest_with_a_right_checksum_is_a_format_error_or_a_manifest(document):
    try:
        manifest = Manifest.from_bytes(sealed(json.loads(json.dumps(document))))
    except FormatError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@settings(max_examples=300)
@given(damaged_bytes(FULL.to_bytes()))
def test_a_damaged_file_is_a_format_error(data):
    with contextlib.suppress(FormatError):
        assert Manifest.from_bytes(data) == FULL  # only blanks were changed


def test_deeply_nested_json_is_a_format_error_or_accepted():
    """Reading it, its checksum and writing it recurse as deep as the nesting, and Python's stack is limited."""
    document = {name: value for name, value in full().items() if name != "crc32"}
    document["commit"]["metadata"] = {"a": "nested"}
    accepted = 0
    for depth in (10, *range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 20), 10_000):
        nested = "[" * depth + "]" * depth
        crc = zlib.crc32(json.dumps(document, sort_keys=True).replace('"nested"', nested).encode())
        data = json.dumps(document | {"crc32": crc}).replace('"nested"', nested).encode()
        with contextlib.suppress(FormatError):
            manifest = Manifest.from_bytes(data)
            assert len(str(manifest.commit.metadata["a"])) == 2 * depth
            accepted += 1
    assert accepted > 0


# ---- metadata ---------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_metadata_is_returned_as_a_copy_that_can_be_stored(metadata):
    copy = check_metadata(metadata)
    assert copy == metadata
    assert copy is not metadata
    manifest = dataclasses.replace(FULL, commit=Commit(1, 0, copy))
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_metadata_is_not_shared_with_the_caller():
    inner = [1]
    copy = check_metadata({"a": inner})
    inner.append(2)
    assert copy == {"a": [1]}


def test_no_metadata_is_an_empty_dict():
    assert check_metadata(None) == {}
    assert check_metadata({}) == {}


def test_any_mapping_is_metadata():
    assert check_metadata(MappingProxyType({"a": 1})) == {"a": 1}


@pytest.mark.parametrize(
    "metadata",
    [5, "ab", [], [("a", 1)], {1: 2}, {None: 1}, {"a": {1, 2}}, {"a": b"b"}, {"a": object()}, {"a": 1j}],
)
def test_metadata_that_json_cannot_express_is_a_type_error(metadata):
    with pytest.raises(TypeError, match="metadata must be a dict"):
        check_metadata(metadata)


def nested(depth):
    value = None
    for _ in range(depth):
        value = [value]
    return {"a": value}


def circular():
    value = {}
    value["self"] = value
    return value


@pytest.mark.parametrize(
    "metadata",
    [{"a": math.nan}, {"a": [math.inf]}, nested(100_000), circular()],
    ids=["nan", "inf", "deep", "circular"],
)
def test_metadata_that_cannot_be_written_is_a_value_error(metadata):
    with pytest.raises(ValueError, match="metadata cannot be written"):
        check_metadata(metadata)


def test_metadata_is_small():
    assert check_metadata({"a": "x" * (2**20 - 9)})
    with pytest.raises(ValueError, match="more than 1 MiB"):
        check_metadata({"a": "x" * (2**20 - 8)})
    with pytest.raises(ValueError, match="more than 1 MiB"):
        check_metadata({"a": "π" * 2**18})  # as it is written to disk


@pytest.mark.parametrize("depth", range(20, 1001, 70))
def test_what_check_metadata_accepts_can_be_read_from_any_stack(depth):
    """Otherwise the commit fails or, worse, the store cannot be opened by a caller that is deeper in the stack."""
    try:
        metadata = check_metadata(nested(depth))
    except ValueError:
        return
    data = dataclasses.replace(FULL, commit=Commit(1, 0, metadata)).to_bytes()

    def read(frames):
        return read(frames - 1) if frames else Manifest.from_bytes(data)

    assert read(500).commit.metadata == metadata


# ---- vocabularies -----------------------------------------------------------------------------------------------

ENTRY = VocabularyEntry(A, "words", "string", reserved=2, rows=9, head=1, tail=3, text_bytes=40, sightings=5)


def test_an_entry_survives_a_round_trip():
    assert VocabularyEntry.from_json(ENTRY.to_json()) == ENTRY
    for edge in ({"head": 3}, {"head": 0, "tail": 0}, {"reserved": 9}):
        assert VocabularyEntry.from_json(ENTRY.to_json() | edge).to_json() == ENTRY.to_json() | edge


@pytest.mark.parametrize(
    "change",
    [{"head": 4}, {"tail": 0}, {"head": 2**62, "tail": 2**62 - 1}, {"reserved": 10}, {"rows": 1}],
    ids=str,
)
def test_an_entry_whose_counts_contradict_each_other_is_refused(change):
    """More freed rows were given out again than were ever freed; or rows are reserved that do not exist."""
    with pytest.raises(FormatError, match="the entry of vocabulary 'words' is impossible"):
        VocabularyEntry.from_json(ENTRY.to_json() | change)


# ---- partitions -------------------------------------------------------------------------------------------------

PARTITION = dataclasses.replace(
    FULL,
    partition=PartitionIdentity(A, 3, 16),
    decision=(1, "head", 7),
    resolved=(8, (2, "π", 0)),
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resolved": None},
        {"decision": None, "commit": None, "resolved": (0, None)},
        {"tags": (TagEntry("t", A),)},
    ],
    ids=str,
)
def test_only_a_manifest_of_a_partition_has_version_3(changes):
    manifest = dataclasses.replace(PARTITION, **changes)
    document = json.loads(manifest.to_bytes())
    assert document["format_version"] == 3
    assert document["partition"] == {"head": A, "number": 3, "count": 16}
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert not {"partition", "decision", "resolved"} & full().keys()


def test_a_program_that_knows_no_partitions_refuses_them(monkeypatch):
    """As programs of version 2 do."""
    data = PARTITION.to_bytes()
    monkeypatch.setattr("shardemb.format.manifest.PARTITION_VERSION", 2)
    with pytest.raises(FormatError, match="format version 3 is newer than 2, .* upgrade"):
        Manifest.from_bytes(data)


def test_what_was_decided_is_the_commit_and_its_attempt():
    assert PARTITION.decided == (7, (1, "head", 7))
    assert Manifest(uuid=A).decided == (0, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("partition", each) for each in (None, {}, [], {"head": A, "number": 16, "count": 16})),
        *(("partition", {"head": each, "number": 0, "count": 1}) for each in ("", "x", 1)),
        *(("partition", {"head": A, "number": 0, "count": each}) for each in (0, -1, "1", 2**21)),
        *(
            ("decision", each)
            for each in (1, [], [1, "a"], [1, 2, 3], ["1", "a", 1], [-1, "a", 1], [1, "a", 2**63])
        ),
        *(("resolved", each) for each in (1, [], [1], [1, 2], [-1, None], [1, [1, "a"]], [1, None, None])),
    ],
)
def test_a_partition_is_checked_even_if_the_checksum_is_right(name, value):
    document = json.loads(PARTITION.to_bytes()) | {name: value}
    with pytest.raises(FormatError):
        Manifest.from_bytes(sealed(document))
    del document[name]
    with pytest.raises(FormatError, match=name):
        Manifest.from_bytes(sealed(document))


@pytest.mark.parametrize(
    ("number", "count"), [(-1, 4), (4, 4), (0, 0), (0, 2**21), (0.5, 4), ("0", 4), (True, 4)], ids=str
)
def test_a_partition_has_a_number_below_the_count(number, count):
    with pytest.raises((TypeError, ValueError)):
        PartitionIdentity(A, number, count)


@pytest.mark.parametrize("head", ["", "x", None, 1])
def test_a_head_is_named_by_its_uuid(head):
    with pytest.raises((TypeError, ValueError)):
        PartitionIdentity(head, 0, 1)
