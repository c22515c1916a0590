"""Frozen rows: each is taken once, as it was when the commit began, whatever changes or moves meanwhile."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside

import shardemb

ROWS, DIM = 200, 3


@pytest.fixture
def table(tmp_path):
    with shardemb.open(tmp_path / "s", threads=1) as store:
        yield store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        inside.shards(store["t"]).end_commit(committed=True)
        store.rollback()


def write(table, rows, value):
    table.write(rows, np.full((len(rows), DIM), value, np.float32))


def take(shards, most):
    ids, records = np.empty(most, np.int64), np.empty((most, DIM), np.float32)
    shards.frozen.fill(ids, records.ctypes.data)
    return dict(zip(ids.tolist(), records[:, 0].tolist(), strict=True))


def test_rows_are_taken_as_they_were(table):
    shards = inside.shards(table)
    write(table, [1, 2, 3], 1)
    shards.freeze()
    assert shards.frozen.count == 3
    assert shards.changes == 0
    write(table, [2, 9], 2)
    assert take(shards, 2) | take(shards, 1) == {1: 1, 2: 1, 3: 1}
    assert sorted(shards.changed_rows().tolist()) == [2, 9]
    assert shards.overlay.kept_bytes == 0


def test_copies_count_as_memory_until_they_are_taken(table):
    shards = inside.shards(table)
    write(table, range(10), 1)
    shards.freeze()
    before = shards.overlay.nbytes
    write(table, range(4), 2)
    write(table, range(4), 3)  # these are not copied again
    assert shards.overlay.nbytes == before + 4 * 4 * DIM
    take(shards, 3)
    assert shards.overlay.nbytes == before + 1 * 4 * DIM
    shards.end_commit(committed=False)
    assert shards.overlay.nbytes == before


def test_a_commit_that_fails_gives_all_rows_back(table):
    shards = inside.shards(table)
    write(table, range(10), 1)
    shards.freeze()
    take(shards, 3)
    write(table, [0, 1, 8, 20], 2)
    shards.end_commit(committed=False)
    assert sorted(shards.changed_rows().tolist()) == [*range(10), 20]
    assert shards.changes == 11
    shards.freeze()
    assert take(shards, 11) == {row: 2 if row in (0, 1, 8, 20) else 1 for row in [*range(10), 20]}


def test_a_fold_does_not_take_frozen_rows_for_rows_that_it_writes(table):
    shards = inside.shards(table)
    write(table, [1, 2], 1)
    shards.freeze()
    shards.begin_fold()
    shards.overlay.end_fold(folded=True)
    assert shards.overlay.are_dirty(np.arange(4)).tolist() == [False, True, True, False]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=40, unique=True)),
        st.tuples(st.just("take"), st.integers(1, 30)),
        st.tuples(st.just("spill"), st.integers(1, 60)),
        st.tuples(st.just("compact"), st.none()),
        st.tuples(st.just("reload"), st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True)),
    ),
    max_size=25,
)


@given(before=st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True), steps=STEPS, ends=st.booleans())
@settings(max_examples=60, deadline=None)
def test_frozen_rows_and_a_model_agree(tmp_path_factory, before, steps, ends):
    folder = tmp_path_factory.mktemp("frozen")
    with shardemb.open(folder / "s", threads=1) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        store.commit()
        shards = inside.shards(table)
        write(table, before, 1)
        shards.freeze()
        left, now, changed, taken = set(before), dict.fromkeys(before, 1), set(), {}
        for number, (what, which) in enumerate(steps, 2):
            if what == "write":
                write(table, which, number)
                now.update(dict.fromkeys(which, number))
                changed.update(which)
            elif what == "take" and left:
                some = take(shards, min(which, len(left)))
                assert some.keys() <= left
                left -= some.keys()
                taken |= some
            elif what == "spill":
                shards.overlay.spill(which, folder)
            elif what == "compact":
                shards.overlay.compact()
            elif what == "reload":
                shards.overlay.reload(np.array(which))
        if ends:
            taken |= take(shards, len(left))
            assert taken == dict.fromkeys(before, 1)
        shards.end_commit(committed=ends)
        assert set(shards.changed_rows().tolist()) == (changed if ends else changed | set(before))
        assert table.lookup(np.arange(ROWS))[:, 0].tolist() == [now.get(row, 0) for row in range(ROWS)]
        store.rollback()
        assert ends or not table.lookup(np.arange(ROWS)).any()
