"""Tables spread over several, and brought back: the same bits, in one pass, continued after an interruption."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardemb
from shardemb.commits import rewrite
from shardemb.dtypes import ScaledInt8
from shardemb.errors import FormatError
from shardemb.format.table_files import TableLocation
from shardemb.initializers import Uniform
from shardemb.optim import Adam
from shardemb.storage import files, table_folder

KINDS = {
    "zeros": {},
    "drawn": {"initializer": Uniform(-1, 1), "optimizer": Adam(lr=0.1)},
    "counted": {"initializer": Uniform(-1, 1), "optimizer": Adam(lr=0.1), "counters": True},
    "int8": {"dtype": ScaledInt8(), "optimizer": Adam(lr=0.1)},
}


def location(path):
    """Write a table of some rows of which others were never written; return where its files are."""
    folder = next(path.glob("t"))
    return TableLocation(table_folder.spec_of(folder, may_miss=True), folder)


def create(path, rows, written, kind):
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=rows, embedding_dim=5, rows_per_shard=512, **KINDS[kind]
        )
        values = np.random.default_rng(0).normal(size=(len(written), 5)).astype(np.float32)
        table.write(written, values)
        if table.optimizer is not None and len(written):
            table.update(written[::2], values[::2])
        store.commit()
        store.checkpoint()
    return location(path)


def parts_of(old, count, folder):
    rows = [max(1, len(range(part, old.spec.num_embeddings, count))) for part in range(count)]
    return [
        TableLocation(replace(old.spec, num_embeddings=each), folder / f"{part}" / "t")
        for part, each in enumerate(rows)
    ]


def contents(table):
    """Records, and which rows were written."""
    return rewrite.read_rows(table, 0, table.spec.num_embeddings)


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(rows=st.integers(1, 5000), count=st.integers(1, 9), seed=st.integers(0, 9), few=st.booleans())
def test_rows_are_where_their_ids_say_and_come_back(tmp_path_factory, kind, rows, count, seed, few):
    folder = tmp_path_factory.mktemp("spread")
    written = np.flatnonzero(np.random.default_rng(seed).random(rows) < (0.01 if few else 0.7))
    old = create(folder / "s", rows, written, kind)
    new, progress = parts_of(old, count, folder), []
    rewrite.spread(old, new, progress.append)
    assert sum(progress) == rows
    records, is_written = contents(old)
    for part, each in enumerate(new):
        found, seen = contents(each)
        mine = len(range(part, rows, count))
        assert_same((found[:mine], seen[:mine]), (records[part::count], is_written[part::count]))
        assert not seen[mine:].any()
    back = TableLocation(old.spec, folder / "back" / "t")
    rewrite.gather(new, back, progress.append)
    assert sum(progress) == 2 * rows
    assert_same(contents(back), (records, is_written))


def test_more_tables_than_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rewrite, "OPEN_SHARDS", 3)
    old = create(tmp_path / "s", 3000, np.arange(0, 3000, 2), "drawn")
    new = parts_of(old, 8, tmp_path)
    rewrite.spread(old, new, lambda rows: None)
    records, _ = contents(old)
    for part, each in enumerate(new):
        np.testing.assert_array_equal(contents(each)[0], records[part::8])


@pytest.mark.parametrize("at", [1, 5, 9])
def test_what_is_complete_is_not_written_again(tmp_path, monkeypatch, at):
    old = create(tmp_path / "s", 6000, np.arange(6000), "drawn")
    new, made, real = parts_of(old, 4, tmp_path), [], files.publish

    def publish(path):
        if len(made) == at:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(path)
        real(path)

    monkeypatch.setattr(files, "publish", publish)
    with pytest.raises(KeyboardInterrupt):
        rewrite.spread(old, new, lambda rows: None)
    progress = []
    rewrite.spread(old, new, progress.append)
    shards = [path for path in made if path != "interrupted" and path.parent.name == "rows"]
    assert len(shards) == len(set(shards)) == sum(each.spec.num_shards for each in new)
    assert sum(progress) == 6000
    records, written = contents(old)
    for part, each in enumerate(new):
        assert_same(contents(each), (records[part::4], written[part::4]))
    back = TableLocation(old.spec, tmp_path / "back" / "t")
    rewrite.gather(new, back, lambda rows: None)
    assert_same(contents(back), (records, written))


def test_damage_is_not_passed_on(tmp_path):
    old = create(tmp_path / "s", 3000, np.arange(3000), "drawn")
    with old.shard(1).path.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    with pytest.raises(FormatError, match="is damaged"):
        rewrite.spread(old, parts_of(old, 4, tmp_path), lambda rows: None)
