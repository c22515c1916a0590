"""A store split into a distributed one, and merged back, by one process on one machine."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import shardemb
from shardemb import splitting
from shardemb.cli import main
from shardemb.errors import PartitionError, ShardEmbError, StoreExistsError, StoreLockedError
from shardemb.initializers import Uniform
from shardemb.optim import Adam
from shardemb.splitting import merge, split
from shardemb.store import opening, spreading
from shardemb.store.partition import Partition

ROWS = 1003
EVERY = np.arange(ROWS)


@pytest.fixture
def source(tmp_path):
    """The path of a store with two tables, some rows of which were never written."""
    path = tmp_path / "one.zarr"
    with shardemb.open(path) as store:
        for name, padding in (("a", 5), ("b", None)):
            table = store.create_table(
                name, num_embeddings=ROWS, embedding_dim=4, optimizer=Adam(lr=0.1),
                initializer=Uniform(-1, 1), padding_idx=padding, counters=name == "b",
            )  # fmt: skip
            table.update(EVERY[::3], np.ones((len(EVERY[::3]), 4), np.float32))
        store.commit(step=7, metadata={"loss": 0.5})
    return path


def contents(path):
    with shardemb.open(path, "r") as store:
        return {
            name: [table.lookup(EVERY), table.state("exp_avg", EVERY), table.step, table.padding_idx]
            for name, table in store.items()
        }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        for mine, theirs in zip(values, expected[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_store_comes_back_as_it_was(source, tmp_path, count):
    before, files = contents(source), sorted(source.rglob("c.*"))
    commit = split(source, tmp_path / "head.zarr", partitions=count)
    assert (commit.id, commit.step, commit.metadata) == (1, 7, {"loss": 0.5})
    assert sorted(source.rglob("c.*")) == files
    assert_same(contents(source), before)
    commit = merge(tmp_path / "head.zarr", tmp_path / "back.zarr")
    assert (commit.id, commit.step, commit.metadata) == (1, 7, {"loss": 0.5})
    assert_same(contents(tmp_path / "back.zarr"), before)


def test_partitions_may_be_elsewhere(source, tmp_path):
    before = contents(source)
    split(source, tmp_path / "head.zarr", partitions=3, folder=tmp_path / "parts")
    shutil.move(tmp_path / "parts", tmp_path / "moved")
    with pytest.raises(PartitionError, match=r"partition 0 of 3 .* is missing.*folder="):
        merge(tmp_path / "head.zarr", tmp_path / "back.zarr")
    assert not (tmp_path / "back.zarr").exists()
    merge(tmp_path / "head.zarr", tmp_path / "back.zarr", folder=tmp_path / "moved")
    assert_same(contents(tmp_path / "back.zarr"), before)


@pytest.mark.parametrize("call", ["prepare", "decide"])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_it_is_split_as_a_whole_or_the_same_call_goes_on(source, tmp_path, monkeypatch, call, at):
    """Stopped at any vote, or while the partitions are told."""
    before, made, real = contents(source), [], getattr(Partition, call)

    def stop(self, *given):
        made.append(self)
        if len(made) == at + 1:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Partition, call, stop)
        split(source, tmp_path / "head.zarr", partitions=4)
    if call == "decide":  # the head had decided
        with pytest.raises(StoreExistsError):
            split(source, tmp_path / "head.zarr", partitions=4)
    else:
        split(source, tmp_path / "head.zarr", partitions=4)
    merge(tmp_path / "head.zarr", tmp_path / "back.zarr")
    assert_same(contents(tmp_path / "back.zarr"), before)


def test_an_interrupted_merge_goes_on(source, tmp_path, monkeypatch):
    before = contents(source)
    split(source, tmp_path / "head.zarr", partitions=4)
    with monkeypatch.context() as patch:
        patch.setattr(spreading, "gather", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path / "head.zarr", tmp_path / "back.zarr")
    merge(tmp_path / "head.zarr", tmp_path / "back.zarr")
    assert_same(contents(tmp_path / "back.zarr"), before)
    with pytest.raises(StoreExistsError, match="back.zarr"):
        merge(tmp_path / "head.zarr", tmp_path / "back.zarr")


def test_what_is_in_the_way_is_refused_by_name(source, tmp_path):
    split(source, tmp_path / "head.zarr", partitions=2)
    with pytest.raises(StoreExistsError, match="head.zarr"):
        split(source, tmp_path / "head.zarr", partitions=2)
    with pytest.raises(
        PartitionError, match=r"is partition 0 of 2 .*, where partition 0 of 2 .* should be created"
    ):
        split(source, tmp_path / "other.zarr", partitions=2, folder=tmp_path / "head.zarr.partitions")
    with pytest.raises(ShardEmbError, match="a store of one machine"):
        merge(source, tmp_path / "back.zarr")
    with pytest.raises(ValueError, match="partitions"):
        split(source, tmp_path / "another.zarr", partitions=0)
    first = tmp_path / "head.zarr.partitions" / splitting.partition_name(0)
    with Partition.hold(first), pytest.raises(StoreLockedError):
        merge(tmp_path / "head.zarr", tmp_path / "back.zarr")
    shutil.rmtree(first)
    shutil.copytree(tmp_path / "head.zarr.partitions" / splitting.partition_name(1), first)
    with pytest.raises(PartitionError, match=r"is partition 1 of 2 .*, where partition 0 of 2 .* should be"):
        merge(tmp_path / "head.zarr", tmp_path / "back.zarr")


def test_a_store_that_is_open_is_not_split(source, tmp_path):
    with shardemb.open(source), pytest.raises(StoreLockedError):
        split(source, tmp_path / "head.zarr")
    assert not (tmp_path / "head.zarr").exists()


def test_a_distributed_store_without_a_commit_cannot_be_merged(tmp_path):
    with opening.open(tmp_path / "head.zarr") as head:
        head.commit(metadata=splitting.Record((("", str(tmp_path / "0.zarr")),)).to_json())
    with pytest.raises(PartitionError, match="no commit"):
        merge(tmp_path / "head.zarr", tmp_path / "back.zarr")


def test_the_commands_do_the_same(source, tmp_path):
    before = contents(source)

    def run(*arguments):
        return CliRunner().invoke(main, [*map(str, arguments), "--quiet"])

    done = run("split", source, tmp_path / "head.zarr", "--partitions", 3, "--json")
    assert json.loads(done.output) == {"id": 1, "step": 7, "metadata": {"loss": 0.5}}
    done = run("merge", tmp_path / "head.zarr", tmp_path / "back.zarr")
    assert done.output.endswith("back.zarr: commit 1 at step 7\n")
    assert_same(contents(tmp_path / "back.zarr"), before)
    done = run("split", source, tmp_path / "head.zarr")
    assert (done.exit_code, "there is a store at" in done.output) == (1, True)
