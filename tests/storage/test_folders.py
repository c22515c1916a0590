import dataclasses
import itertools
import os

import pytest
from support.specs import make

from shardemb.errors import FormatError
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.manifest import TableEntry
from shardemb.storage import files, folders

UUIDS = [f"0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c{k:02d}" for k in range(6)]


def folder(path, uuid):
    """A table's folder: its document, and a file that identifies it."""
    spec = dataclasses.replace(make(), uuid=uuid)
    (path / "rows").mkdir(parents=True)
    (path / zarr_metadata.DOCUMENT).write_bytes(zarr_metadata.table_documents(spec)[zarr_metadata.DOCUMENT])
    (path / "rows" / "c.0.0").write_text(uuid)


def tables(**names):
    """The tables of a manifest: name=number of the table."""
    return [TableEntry(UUIDS[number], name, 0, None) for name, number in names.items()]


@pytest.fixture
def store(tmp_path):
    """A store with the tables a, b and c; d is parked, as a new one is."""
    for number, name in enumerate("abc"):
        folder(tmp_path / name, UUIDS[number])
    folder(store_paths.parked(tmp_path, UUIDS[3]), UUIDS[3])
    return tmp_path


def content(store):
    """Map names to numbers, for the tables that are at their names."""
    return {
        path.name: UUIDS.index((path / "rows" / "c.0.0").read_text())
        for path in store.iterdir()
        if (path / "rows" / "c.0.0").exists()
    }


def parked(store):
    place = store_paths.private(store) / "tables"
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


# ---- finding folders --------------------------------------------------------------------------------------------


def test_names_of_a_store_are_pinned(tmp_path):
    assert store_paths.private(tmp_path) == tmp_path / ".shardemb"
    assert store_paths.manifest(tmp_path) == tmp_path / ".shardemb" / "manifest.json"
    assert store_paths.lock(tmp_path) == tmp_path / ".shardemb" / "lock"
    assert store_paths.parked(tmp_path, UUIDS[0]) == tmp_path / ".shardemb" / "tables" / UUIDS[0]


def test_a_table_is_found_wherever_it_is(store):
    found = folders.locate(store, tables(b=0, x=1, c=2, d=3))
    assert found == {
        UUIDS[0]: store / "a",
        UUIDS[1]: store / "b",
        UUIDS[2]: store / "c",
        UUIDS[3]: store_paths.parked(store, UUIDS[3]),
    }


def test_a_table_without_a_folder_is_named(store):
    for find in (folders.locate, folders.arrange):
        with pytest.raises(FormatError, match="folder of table 'lost' is missing"):
            find(store, tables(a=0, lost=5))
    assert content(store) == {"a": 0, "b": 1, "c": 2}


def test_only_existing_documents_are_read(store):
    assert list(folders.documents(store / "a")) == ["zarr.json"]
    (store / "a" / "rows" / "zarr.json").write_bytes(b"{}")
    assert folders.documents(store / "a")["rows/zarr.json"] == b"{}"
    assert folders.documents(store / "missing") == {}


# ---- arranging --------------------------------------------------------------------------------------------------


def test_a_folder_in_its_place_is_not_touched(store, monkeypatch):
    monkeypatch.setattr(files, "rename", lambda *paths: pytest.fail(f"renamed {paths}"))
    places = folders.arrange(store, tables(a=0, b=1, c=2))
    assert places == {UUIDS[k]: store / "abc"[k] for k in range(3)}
    assert content(store) == {"a": 0, "b": 1, "c": 2}


def test_a_new_table_gets_its_name_and_other_parked_folders_are_removed(store):
    folder(store_paths.parked(store, UUIDS[4]), UUIDS[4])
    folders.arrange(store, tables(a=0, b=1, c=2, d=3))
    assert content(store) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert parked(store) == []


def test_a_dropped_table_is_removed_and_folders_that_the_manifest_does_not_name_stay(store):
    """A folder that is not the store's is never deleted."""
    folders.arrange(store, tables(a=0), tables(b=1))
    assert content(store) == {"a": 0, "c": 2}
    assert parked(store) == []


def test_a_new_table_may_have_the_name_of_a_dropped_one(store):
    folders.arrange(store, tables(a=0, b=3, c=2), tables(b=1))
    assert content(store) == {"a": 0, "b": 3, "c": 2}


CHANGES = [
    (tables(b=0, a=1, c=2), []),  # two swap their names
    (tables(b=0, c=1, a=2), []),  # three do
    (tables(b=0, x=1, c=2), []),  # one takes the former name of another
    (tables(x=0, y=1, z=2), []),
    (tables(a=3, b=0, c=2), tables(b=1)),  # new, renamed and dropped in one commit
    (tables(c=3), tables(a=0, b=1, c=2)),
    (tables(), tables(a=0, b=1, c=2)),
]


class Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch, call):
    """Crash instead of making the call with this number, of all calls that change folders."""
    calls = itertools.count()
    for name in ("make_directory", "rename", "sync_directory", "remove_tree"):
        original = getattr(files, name)

        def counted(*args, original=original):
            if next(calls) == call:
                raise Crash
            return original(*args)

        monkeypatch.setattr(files, name, counted)


@pytest.mark.parametrize(("wanted", "dropped"), CHANGES)
def test_it_can_be_interrupted_anywhere_and_repeated(tmp_path_factory, wanted, dropped):
    expected = {table.name: UUIDS.index(table.uuid) for table in wanted}
    for call in itertools.count():
        store = tmp_path_factory.mktemp("store")
        for number, name in enumerate("abc"):
            folder(store / name, UUIDS[number])
        folder(store_paths.parked(store, UUIDS[3]), UUIDS[3])
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, call)
            try:
                folders.arrange(store, wanted, dropped)
                crashed = False
            except Crash:
                crashed = True
        # A reader finds every table in between, and the next writer puts each in its place.
        assert set(folders.locate(store, wanted)) == {table.uuid for table in wanted}
        folders.arrange(store, wanted, dropped)
        assert content(store) == expected
        assert parked(store) == []
        if not crashed:
            assert call > 0
            return


@pytest.mark.parametrize(("wanted", "dropped"), CHANGES[:2])
def test_it_can_be_interrupted_twice(tmp_path_factory, wanted, dropped):
    for first, second in itertools.product(range(7), repeat=2):
        store = tmp_path_factory.mktemp("store")
        for number, name in enumerate("abc"):
            folder(store / name, UUIDS[number])
        for call in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                crash_at(patch, call)
                try:
                    folders.arrange(store, wanted, dropped)
                except Crash:
                    continue
        folders.arrange(store, wanted, dropped)
        assert content(store) == {table.name: UUIDS.index(table.uuid) for table in wanted}


def test_the_first_renames_are_durable_before_the_second(store, monkeypatch):
    """If the second renames reached the disk without the first, two folders would have one name."""
    events = []
    for name in ("rename", "sync_directory"):
        original = getattr(files, name)

        def watched(*paths, name=name, original=original):
            events.append(name)
            original(*paths)

        monkeypatch.setattr(files, name, watched)
    folders.arrange(store, tables(b=0, a=1, c=2))
    assert events == ["rename", "rename", "sync_directory", "sync_directory"] * 2


# ---- foreign folders --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "link", "broken link", "other table"])
def test_a_foreign_thing_in_a_tables_place_is_neither_moved_nor_deleted(store, kind):
    place = store / "x"
    if kind == "file":
        place.write_text("theirs")
    elif kind == "folder":
        (place / "deep").mkdir(parents=True)
    elif kind == "other table":
        folder(place, UUIDS[5])
    else:
        place.symlink_to(store / "a" if kind == "link" else store / "nowhere")
    before = sorted(os.listdir(store))
    with pytest.raises(FormatError, match=r"x is where table 'x' belongs.*move it away"):
        folders.arrange(store, tables(x=0, b=1, c=2) if kind != "link" else tables(a=0, x=1, c=2))
    assert sorted(os.listdir(store)) == before
    assert (store / "a").is_dir()


def test_foreign_folders_and_files_stay(store):
    (store / "notes.txt").write_text("theirs")
    (store / "their folder").mkdir()
    folder(store / "their table", UUIDS[5])
    folders.arrange(store, tables(b=0, a=1), tables(c=2))
    assert content(store) == {"a": 1, "b": 0, "their table": 5}
    assert (store / "notes.txt").exists()
    assert (store / "their folder").exists()


def test_a_copy_of_a_tables_folder_is_not_taken_for_the_table(store):
    """A user makes a backup next to the table, and then renames or drops the table."""
    folder(store / "a copy", UUIDS[1])
    folder(store / "z copy", UUIDS[1])
    places = folders.arrange(store, tables(a=0, b=1, c=2))
    assert places[UUIDS[1]] == store / "b"
    assert content(store) == {"a": 0, "b": 1, "c": 2, "a copy": 1, "z copy": 1}


def test_dropping_a_table_with_a_copy_of_its_folder_works(store):
    folder(store / "z copy", UUIDS[1])
    folders.arrange(store, tables(a=0, c=2), tables(b=1))
    assert "b" not in content(store)
    assert parked(store) == []


def test_renaming_a_table_with_a_copy_of_its_folder_does_not_guess(store):
    """Which of the two is the table cannot be known; the wrong one would have old rows under a new commit."""
    folder(store / "A copy", UUIDS[1])
    (store / "A copy" / "rows" / "c.0.0").write_text(UUIDS[5])
    try:
        folders.arrange(store, tables(a=0, x=1, c=2))
    except FormatError:
        assert content(store)["b"] == 1
    else:
        assert content(store)["x"] == 1


def test_a_link_to_a_tables_folder_is_no_copy(store):
    (store / "A link").symlink_to(store / "b")
    folders.arrange(store, tables(a=0, x=1, c=2))
    assert content(store) == {"a": 0, "x": 1, "c": 2}
    assert (store / "A link").is_symlink()


@pytest.mark.parametrize(
    ("names", "foreign"),
    [
        ([], []),
        ([".shardemb"], []),
        ([".shardemb", "zarr.json"], []),
        (["zarr.json.tmp"], []),
        (["b.txt", ".shardemb", "a"], ["a", "b.txt"]),
        ([".git"], [".git"]),
    ],
)
def test_a_store_may_be_created_in_an_empty_folder_or_after_an_interrupted_creation(tmp_path, names, foreign):
    for name in names:
        if name == "zarr.json":
            (tmp_path / name).write_bytes(zarr_metadata.store_documents(UUIDS[0])[name])
        else:
            (tmp_path / name).touch()
    assert folders.foreign(tmp_path) == foreign


def test_a_zarr_group_of_another_program_is_foreign(tmp_path):
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    assert folders.foreign(tmp_path) == ["zarr.json"]


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path):
    assert folders.foreign(tmp_path / "missing") == []
