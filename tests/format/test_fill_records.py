"""Fills as data: the rows of blocks, the note, the records of the log; and that nothing in a file is trusted."""

import json
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardemb.base.sizes import PAGE
from shardemb.errors import FormatError
from shardemb.format.documents import crc32
from shardemb.format.fill_records import Fill, Filled, Note, joined, pack, payload_bytes, unpack

TABLE = str(uuid.UUID(int=7))
record_bytes = st.integers(1, 3000).map(lambda words: 4 * words)


@given(st.integers(0, 1000), st.integers(1, 1000), record_bytes)
def test_the_rows_of_a_fill_lie_in_its_blocks_as_a_whole(first, count, size):
    start, stop = Fill(TABLE, first, first + count).rows(size)
    assert start <= stop
    if start < stop:
        assert start * size >= first * PAGE > (start - 1) * size
        assert stop * size <= (first + count) * PAGE < (stop + 1) * size


@given(st.integers(0, 1000), st.integers(1, 1000), record_bytes, st.integers(1, 300))
def test_parts_have_the_same_rows_and_checksums(first, count, size, most):
    fill = Fill(TABLE, first, first + count)
    parts = list(Filled(fill, np.arange(count, dtype=np.uint64)).cut(size, most))
    assert np.concatenate([part.sums for part in parts]).tolist() == list(range(count))
    assert [part.fill.stop for part in parts[:-1]] == [part.fill.first for part in parts[1:]]
    rows = [row for part in parts for row in range(*part.fill.rows(size))]
    assert rows == list(range(*fill.rows(size)))
    assert list(joined((part.fill for part in parts), size)) == [fill]


def test_fills_that_share_a_row_are_not_joined():
    fills = [Fill(TABLE, 0, 2), Fill(TABLE, 2, 4), Fill(TABLE, 5, 6)]
    assert list(joined(fills, 3000)) == fills
    assert list(joined(fills, 4096)) == [Fill(TABLE, 0, 4), Fill(TABLE, 5, 6)]


def test_a_note_is_read_as_it_was_written():
    note = Note(5, (Fill(TABLE, 1, 9), Fill(TABLE, 20, 2**40)))
    assert Note.from_bytes(note.to_bytes()) == note
    assert Note.from_bytes(Note(1).to_bytes()) == Note(1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format_version": 2}, "version 2"),
        ({"epoch": -1}, "epoch"),
        ({"fills": 3}, "fills"),
        ({"fills": [3]}, "a fill is"),
        ({"fills": [{"table": TABLE, "blocks": [5, 5]}]}, "a fill is"),
        ({"fills": [{"table": TABLE, "blocks": [True, 5]}]}, "a fill is"),
        ({"fills": [{"table": TABLE, "blocks": [-1, 5]}]}, "a fill is"),
        ({"fills": [{"table": "../x", "blocks": [1, 5]}]}, "table is"),
    ],
)
def test_a_note_that_says_what_cannot_be_is_refused(change, why):
    document = json.loads(Note(5).to_bytes()) | change
    with pytest.raises(FormatError, match=why):
        Note.from_bytes(json.dumps(document | {"crc32": crc32(document)}).encode())


def test_a_damaged_note_is_refused():
    data = Note(5, (Fill(TABLE, 1, 9),)).to_bytes()
    for place in range(len(data)):
        with pytest.raises(FormatError):
            Note.from_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@given(st.integers(0, 2**50), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=9))
def test_a_record_is_read_as_it_was_written(first, sums):
    filled = Filled(Fill(TABLE, first, first + len(sums)), np.array(sums, np.uint64))
    payload = bytearray(payload_bytes(len(sums)))
    pack(filled, memoryview(payload))
    found = unpack(TABLE, len(sums), bytes(payload))
    assert (found.fill, found.sums.tolist()) == (filled.fill, sums)
    for count in (0, len(sums) - 1, len(sums) + 1, 2**60):
        assert unpack(TABLE, count, bytes(payload)) is None
