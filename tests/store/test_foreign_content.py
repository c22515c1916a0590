"""What other programs have put into a store's folder stays, and never makes a commit fail."""

import json
import os
import shutil

import numpy as np
import pytest
import zarr

import shardemb
from shardemb.commits import log_writer
from shardemb.errors import TableExistsError
from shardemb.optim import SGD, Adagrad
from shardemb.storage import files

DIM = 4


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.zarr"


def create(store, name="t", **arguments):
    defaults = {"num_embeddings": 300, "embedding_dim": DIM, "rows_per_shard": 64, "optimizer": SGD(lr=1.0)}
    return store.create_table(name, **(defaults | arguments))


# ---- where a table's folder belongs -----------------------------------------------------------------------------

KINDS = {
    "folder": lambda place: (place.mkdir(), (place / "thesis.txt").write_text("mine")),
    "file": lambda place: place.write_text("mine"),
    "link": lambda place: place.symlink_to("nowhere"),
    "zarr array": lambda place: zarr.create_array(place, shape=(3,), dtype="i4"),
    "table of another store": lambda place: make_other(place),
}


def make_other(place):
    other = place.parent.parent / "other.zarr"
    with shardemb.open(other) as store:
        create(store)
        store.commit()
    shutil.copytree(other / "t", place)


def listing(folder):
    return sorted(
        (str(each), os.lstat(each).st_size) for each in folder.rglob("*") if ".shardemb" not in each.parts
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_whose_place_is_taken_is_refused_at_once(path, kind):
    with shardemb.open(path) as store:
        table = create(store, "old")
        store.commit()
        KINDS[kind](path / "new")
        before = listing(path)
        for call in (lambda: create(store, "new"), lambda: store.rename_table("old", "new")):
            with pytest.raises(TableExistsError, match=r"s\.zarr/new is not part of the store.*move it away"):
                call()
        assert not store.has_changes
        assert listing(path) == before
        assert os.listdir(path / ".shardemb/tables") == []
        table.write([1], np.ones((1, DIM)))
        store.commit()
    assert listing(path) == before


@pytest.mark.parametrize("kind", ["keys", "freed", "bytes", "sketch"])
def test_so_is_a_vocabulary_whose_tables_have_no_place(path, kind):
    with shardemb.open(path) as store:
        (path / f"v@{kind}").write_text("mine")
        with pytest.raises(TableExistsError, match=f"v@{kind} is not part of the store"):
            store.create_vocabulary("v", key_type="string", admission=shardemb.Admission(after=2, width=64))
        assert len(store.vocabularies) == 0
        store.commit()
        store.create_vocabulary("w", key_type="int64")
        store.commit()


def test_names_that_tables_of_the_store_leave_are_free(path):
    with shardemb.open(path) as store:
        create(store, "a").write([1], np.full((1, DIM), 1.0))
        create(store, "b").write([1], np.full((1, DIM), 2.0))
        store.commit()
        store.rename_table("a", "c")
        store.rename_table("b", "a")
        store.rename_table("c", "b")
        store.drop_table("a")
        create(store, "a").write([1], np.full((1, DIM), 3.0))
        store.commit()
        store.drop_table("b")
        store.commit()
        create(store, "b")
        store.commit()
    with shardemb.open(path) as store:
        assert [store[name].lookup([1])[0, 0] for name in ("a", "b")] == [3, 0]


def test_a_dropped_table_whose_folder_is_still_there_leaves_its_name_free(path, monkeypatch):
    """While the disk is full, folds fail, and folders stay where they are."""

    def full(path, data):
        raise shardemb.DiskFullError(28, "full")

    with shardemb.open(path) as store:
        create(store).write([1], np.ones((1, DIM)))
        store.commit()
        with monkeypatch.context() as patch:
            patch.setattr(files, "replace", full)
            store.drop_table("t")
            store.commit()
            assert (path / "t").is_dir()
            create(store)
        store.commit()
    with shardemb.open(path, "r") as store:
        assert store["t"].lookup([1]).tolist() == [[0] * DIM]


def test_a_name_that_the_file_system_refuses_is_refused_at_once(path, monkeypatch):
    """Some file systems take names of 143 bytes, or only certain characters."""
    real = type(path).lstat

    def lstat(self):
        if self.name == "long":
            raise OSError(36, "File name too long")
        return real(self)

    with shardemb.open(path) as store:
        create(store)
        monkeypatch.setattr(type(path), "lstat", lstat)
        for call in (lambda: create(store, "long"), lambda: store.rename_table("t", "long")):
            with pytest.raises(ValueError, match="'long' cannot be a table's name, .*File name too long"):
                call()
        store.commit()


# ---- what is in a table's folder, and next to it ----------------------------------------------------------------


def add_content(path, name="t"):
    """Add arrays, groups, files, links and attributes to a store and a table of it, as zarr's users do."""
    group = zarr.open_group(path, mode="r+")
    group.attrs["title"] = "mine"
    group.create_array("labels", data=np.arange(5), chunks=(2,))
    group.create_group("deep/er").attrs["x"] = 1
    table = group[name]
    table.attrs.update({"units": ["a", "ä"], "none": None})
    table.create_array("words", data=np.arange(7), chunks=(3,))
    for array in ("rows", "checks"):
        table[array].attrs["about"] = {"who": array}
    (path / name / "rows" / "notes.txt").write_text("of rows")
    for folder in (path, path / name):
        (folder / "empty").mkdir()
        (folder / "README").write_text(f"read {folder.name}")
        (folder / "link").symlink_to("README")
        (folder / "dangling").symlink_to("/nowhere")
    with (path / name / "holes").open("wb") as file:
        file.seek(2**20)
        file.write(b"end")


def assert_content(path, name="t"):
    group = zarr.open_group(path, mode="r")
    assert group.attrs["title"] == "mine"
    assert group["labels"][:].tolist() == list(range(5))
    assert group["deep/er"].attrs["x"] == 1
    table = group[name]
    assert table.attrs["units"] == ["a", "ä"]
    assert table.attrs["none"] is None
    assert table["words"][:].tolist() == list(range(7))
    assert table["rows"].attrs["about"] == {"who": "rows"}
    assert table["checks"].attrs["about"] == {"who": "checks"}
    assert (path / name / "rows" / "notes.txt").read_text() == "of rows"
    for folder, word in ((path, "read s.zarr"), (path / name, f"read {name}")):
        assert list((folder / "empty").iterdir()) == []
        assert (folder / "README").read_text() == word
        assert os.readlink(folder / "link") == "README"
        assert os.readlink(folder / "dangling") == "/nowhere"
    assert (path / name / "holes").read_bytes() == bytes(2**20) + b"end"
    assert os.stat(path / name / "holes").st_blocks * 512 < 2**19


CHANGES = {
    "grow": lambda store: (store["t"].resize(1000), store.commit()),
    "shrink": lambda store: (store["t"].resize(101, drop_rows=True), store.commit()),
    "other shards": lambda store: store.reshard("t", rows_per_shard=128),
    "other optimizer": lambda store: store.reshard("t", optimizer=Adagrad(initial_accumulator_value=0.5)),
    "again and again": lambda store: (
        store["t"].resize(1000),
        store["t"].resize(2000),
        store.rename_table("t", "u"),
        store.commit(),
        store.reshard("u", optimizer=None),
        store.rename_table("u", "t"),
        store.commit(),
    ),
    "rollback": lambda store: (store["t"].resize(1000), store.rollback()),
}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_changes_its_form_keeps_what_others_have_added(path, change, links, monkeypatch):
    if not links:
        monkeypatch.setattr(files, "link", lambda source, target: False)
    with shardemb.open(path) as store:
        create(store).write(range(100), np.ones((100, DIM)))
        store.commit()
    add_content(path)
    with shardemb.open(path) as store:
        CHANGES[change](store)
    assert_content(path)
    with shardemb.open(path) as store:
        assert (store["t"].lookup(range(100)) == 1).all()
        assert store.verify() == []
        store["t"].write([1], np.zeros((1, DIM)))
        store.commit()
    assert_content(path)
    assert json.loads((path / "zarr.json").read_bytes())["attributes"]["shardemb"]


def test_documents_with_attributes_of_others_are_opened_without_zarr(path, monkeypatch):
    """The checksum of a rewritten table's documents is over what they say then."""
    with shardemb.open(path) as store:
        create(store)
        store.commit()
    add_content(path)
    with shardemb.open(path) as store:
        store["t"].resize(1000)
        store.commit()
    monkeypatch.setattr(
        shardemb.format.zarr_metadata, "_check_arrays", lambda *arguments: pytest.fail("checked")
    )
    shardemb.format.zarr_metadata._table_spec.cache_clear()
    with shardemb.open(path, "r") as store:
        assert store["t"].num_embeddings == 1000


def test_tables_that_grow_with_their_vocabulary_keep_it_too(path):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="string")
        store.create_table("t", vocabulary="v", embedding_dim=DIM, rows_per_shard=64)
        words.add(["a"])
        store.commit()
    add_content(path)
    (path / "v@keys" / "README").write_text("read v@keys")
    with shardemb.open(path) as store:
        for turn in range(3):
            store.vocabularies["v"].add([f"{turn} {i}" for i in range(200)])
            store.commit()
        assert store["t"].rows.num_embeddings > 600
    assert_content(path)
    assert (path / "v@keys" / "README").read_text() == "read v@keys"


def test_a_copy_has_all_of_it(path, tmp_path):
    with shardemb.open(path) as store:
        create(store).write([1], np.ones((1, DIM)))
        store.commit()
    add_content(path)
    os.mkfifo(path / "pipe")  # never opened, or the copy would hang
    seen = []
    with shardemb.open(path) as store:
        create(store, "later")  # no part of the last commit
        store.copy(tmp_path / "to" / "s.zarr", progress=lambda done, total: seen.append((done, total)))
        store.rollback()
    assert seen[-1][0] == seen[-1][1] > 2**20
    target = tmp_path / "to" / "s.zarr"
    assert_content(target)
    with shardemb.open(target) as copied:
        assert list(copied) == ["t"]
        assert copied["t"].lookup([1]).tolist() == [[1] * DIM]
    # It is a copy: what happens to one does not happen to the other.
    (target / "t" / "README").write_text("changed")
    assert_content(path)


def test_a_copy_into_the_store_itself_ends(path):
    with shardemb.open(path) as store:
        create(store).write([1], np.ones((1, DIM)))
        store.commit()
        store.copy(path / "copies" / "1")
        (path / "copies" / "notes").write_text("mine")
        store.copy(path / "copies" / "2")
    assert sorted(os.listdir(path / "copies" / "2" / "copies")) == ["1", "notes"]
    with shardemb.open(path / "copies" / "2", "r") as store:
        assert store["t"].lookup([1]).tolist() == [[1] * DIM]


def test_a_folder_named_like_an_array_does_not_become_one(path):
    """A table without presence bits has no folder `present`; readers go by that."""
    with shardemb.open(path) as store:
        create(store, optimizer=Adagrad(initial_accumulator_value=0.5)).write([1], np.ones((1, DIM)))
        store.commit()
    (path / "t" / "present" / "notes").write_text("of bits")
    (path / "t" / "checks" / "notes").write_text("of checksums")
    with shardemb.open(path) as store:
        store.reshard("t", optimizer=None)
    assert sorted(os.listdir(path / "t")) == ["checks", "rows", "zarr.json"]
    assert (path / "t" / "checks" / "notes").read_text() == "of checksums"


@pytest.mark.parametrize("change", ["resize", "reshard"])
def test_what_is_kept_is_durable_before_a_commit_names_it(path, change, monkeypatch):
    """After the last file that is carried over, and before the commit record, the whole file system is synced."""
    with shardemb.open(path) as store:
        create(store).write(range(300), np.ones((300, DIM)))
        store.commit()
    add_content(path)
    calls = []

    def spy(owner, name):
        real = getattr(owner, name)

        def record(*arguments):
            calls.append((name, str(arguments)))
            return real(*arguments)

        monkeypatch.setattr(owner, name, record)

    for name in ("link", "copy_link", "sync_tree"):
        spy(files, name)
    spy(log_writer.Log, "append_commit")
    with shardemb.open(path) as store:
        if change == "resize":
            store["t"].resize(1000)
            store.commit()
        else:
            store.reshard("t", rows_per_shard=128)
    kept = [i for i, (_, arguments) in enumerate(calls) if "README" in arguments or "dangling" in arguments]
    names = [name for name, _ in calls]
    assert {names[i] for i in kept} == {"link", "copy_link"}
    assert "sync_tree" in names[max(kept) : names.index("append_commit")]
    assert_content(path)
