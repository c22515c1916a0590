"""Tables as the external storage of dynamicemb, against a dict of Python, called as that package calls a storage.

The package itself needs a GPU. Its interface is written down here: the names and the order of the arguments of
``dynamicemb.types.Storage``, and how its caches use what it returns.
"""

import enum
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import shardemb  # noqa: E402
from shardemb.dynamicemb import external_storage  # noqa: E402


class CopyMode(enum.Enum):
    EMBEDDING = "embedding"
    VALUE = "value"


INTERFACE = {
    "find": "unique_keys table_ids copy_mode lfu_accumulated_frequency",
    "insert": "keys table_ids values scores preserve_existing",
    "dump": "table_id meta_file_path emb_key_path embedding_file_path score_file_path opt_file_path",
    "load": "table_id meta_file_path emb_key_path embedding_file_path score_file_path opt_file_path include_optim "
    "timestamp",
    "embedding_dtype": "",
    "embedding_dim": "table_id",
    "value_dim": "table_id",
    "max_embedding_dim": "",
    "max_value_dim": "",
    "init_optimizer_state": "",
    "export_keys_values": "device batch_size table_id",
}


class Adam:
    """As dynamicemb's optimizers: two moments, of which a checkpoint has all but `padding` values."""

    def __init__(self, padding=0, kind="adam"):
        self.padding, self.args = padding, {"opt_type": kind, "lr": 0.1}

    def get_state_dim(self, emb_dim):
        return 2 * emb_dim + self.padding

    def get_ckpt_state_dim(self, emb_dim):
        return 2 * emb_dim

    def get_initial_optim_states(self):
        return 0.25

    def get_opt_args(self):
        return dict(self.args)

    def set_opt_args(self, args):
        self.args = {name: args[name] for name in self.args}


def options(*dims, dtype=torch.float32, **others):
    return [SimpleNamespace(dim=dim, embedding_dtype=dtype, **others) for dim in dims]


def tables_of(keys, number=0):
    return torch.full((len(keys),), number)


@pytest.fixture
def storage(store):
    return external_storage(store)(options(4, 2), Adam())


def test_it_has_the_methods_of_the_interface(storage):
    for name, expected in INTERFACE.items():
        found = list(inspect.signature(getattr(storage, name)).parameters)
        assert found[: len(expected.split())] == expected.split(), name


def test_shapes(storage):
    assert (storage.embedding_dim(0), storage.embedding_dim(1), storage.max_embedding_dim()) == (4, 2, 4)
    assert (storage.value_dim(0), storage.value_dim(1), storage.max_value_dim()) == (12, 6, 12)
    assert storage.embedding_dtype() is torch.float32
    assert storage.embedding_dims().tolist() == [4, 2]
    assert not storage.all_dims_vec4()
    assert storage.init_optimizer_state() == 0.25
    assert storage._state is None  # the cache asks whether it evicts


KEYS = st.sampled_from([-(2**63), -1, 0, 1, 7, 2**40, 2**63 - 1])
STEPS = st.lists(
    st.tuples(
        st.booleans(), st.lists(st.tuples(KEYS, st.integers(0, 1)), unique=True, max_size=6), st.booleans()
    ),
    max_size=6,
)


@settings(max_examples=25)
@given(STEPS)
def test_it_holds_what_a_dict_holds(new_store, steps):
    rng = np.random.default_rng(0)
    held, widths = {}, [(4, 8), (2, 4)]
    with new_store() as store:
        storage = external_storage(store)(options(4, 2), Adam())
        for inserts, which, scored in steps:
            keys, tables = (
                torch.tensor([each[place] for each in which], dtype=torch.int64) for place in (0, 1)
            )
            if inserts:
                values = torch.from_numpy(rng.standard_normal((len(which), 12)).astype(np.float32))
                scores = torch.from_numpy(rng.integers(-(2**62), 2**62, len(which))) if scored else None
                storage.insert(keys, tables, values, scores, preserve_existing=not scored)
                for number, each in enumerate(which):
                    old = held.get(each, (None, 0))[1]
                    held[each] = values[number], int(scores[number]) if scored else old
                continue
            for mode in CopyMode:
                found = storage.find(keys, tables, mode, torch.arange(len(which)))
                count, missing, places, of, frequencies, founds, scores, values = found
                absent = [number for number, each in enumerate(which) if each not in held]
                assert (count, places.tolist()) == (len(absent), absent)
                assert missing.tolist() == keys[absent].tolist()
                assert of.tolist() == tables[absent].tolist()
                assert frequencies.tolist() == absent
                assert founds.tolist() == [each in held for each in which]
                assert values.shape == (len(which), 12 if mode is CopyMode.VALUE else 4)
                for number, each in enumerate(which):
                    value, score = held.get(each, (torch.zeros(12), 0))
                    dim, state = widths[each[1]]
                    assert torch.equal(values[number, :dim], value[:dim])
                    assert scores[number] == score
                    if mode is CopyMode.VALUE:
                        assert torch.equal(values[number, 4 : 4 + state], value[4 : 4 + state])
        assert storage.size() == len(held)


def test_it_is_made_from_a_copy_of_its_options(store):
    """dynamicemb copies its options deeply before it makes a storage."""
    import copy

    given = options(4, external_storage=external_storage(store))
    storage = copy.deepcopy(given)[0].external_storage(given, Adam())
    assert storage.store is store


def test_a_cache_in_front_trains_as_without(store):
    """Rows are found, trained, and inserted again when they are evicted; new ones begin with the initial state."""
    storage = external_storage(store)(options(4), Adam())
    rng, rows = np.random.default_rng(0), {}
    for _ in range(20):
        keys = torch.from_numpy(rng.choice(30, 8, replace=False))
        found = storage.find(keys, tables_of(keys), CopyMode.VALUE)
        values = found.values
        values[found.missing_indices, :4] = 1
        values[found.missing_indices, 4:] = storage.init_optimizer_state()
        expected = torch.stack([rows.get(int(key), torch.tensor([1.0] * 4 + [0.25] * 8)) for key in keys])
        assert torch.equal(values, expected)
        values = values * 0.5 + 1
        storage.insert(keys, tables_of(keys), values, preserve_existing=True)
        rows |= zip(keys.tolist(), values, strict=True)


def test_rows_come_back_when_the_store_is_opened_again(path):
    with shardemb.open(path) as store:
        storage = external_storage(store, "clicks")(options(4), Adam())
        storage.insert(torch.tensor([5]), torch.tensor([0]), torch.arange(12.0)[None], torch.tensor([9]))
        store.commit(step=1)
        storage.insert(torch.tensor([6]), torch.tensor([0]), torch.ones(1, 12))
        store.rollback()
    with shardemb.open(path) as store:
        storage = external_storage(store, "clicks")(options(4), Adam())
        found = storage.find(torch.tensor([5, 6]), torch.tensor([0, 0]), CopyMode.VALUE)
        assert found.founds.tolist() == [True, False]
        assert found.scores.tolist() == [9, 0]
        assert torch.equal(found.values[0], torch.arange(12.0))


def test_short_rows_and_unsigned_scores(store):
    storage = external_storage(store)(options(4, dtype=torch.bfloat16), Adam())
    values = torch.randn(2, 12).bfloat16()
    scores = torch.tensor([3, 4]).to(torch.uint64)
    storage.insert(torch.tensor([1, 2]), torch.tensor([0, 0]), values, scores)
    found = storage.find(torch.tensor([1, 2]), torch.tensor([0, 0]), CopyMode.VALUE)
    assert found.values.dtype is torch.bfloat16
    assert torch.equal(found.values, values)
    assert found.scores.tolist() == [3, 4]


def files_in(folder):
    return [str(folder / name) for name in ("meta.json", "keys", "values", "scores", "opt_values")]


def dumped(storage, folder):
    folder.mkdir()
    storage.dump(0, *files_in(folder), include_optim=True, include_meta=True, current_score=None, timestamp=0)
    return files_in(folder)


@pytest.mark.parametrize("padding", [0, 4])
def test_files_are_those_of_dynamicemb(store, new_store, tmp_path, padding, monkeypatch):
    monkeypatch.setattr("shardemb.dynamicemb._KEYS_AT_ONCE", 4)
    storage = external_storage(store)(options(4), Adam(padding))
    keys, values = torch.arange(100, 110), torch.randn(10, 12 + padding)
    storage.insert(keys, tables_of(keys), values, keys * 2)
    store["dynamicemb0"].delete([103])
    paths = dumped(storage, tmp_path / "dump")
    left = np.delete(np.arange(10), 3)
    assert json.loads((tmp_path / "dump" / "meta.json").read_text())["dist_type"] == "roundrobin"
    assert np.fromfile(paths[1], np.int64).tolist() == keys[left].tolist()
    assert np.array_equal(np.fromfile(paths[2], np.float32).reshape(9, 4), values[left, :4])
    assert np.fromfile(paths[3], np.int64).tolist() == (2 * keys[left]).tolist()
    assert np.array_equal(np.fromfile(paths[4], np.float32).reshape(9, 8), values[left, 4:12])
    with new_store() as other:
        loaded = external_storage(other)(options(4), Adam(padding))
        loaded.load(0, *paths, include_optim=True, timestamp=0)
        found = loaded.find(keys, tables_of(keys), CopyMode.VALUE)
        assert torch.equal(found.values[left, :12], values[left, :12])
        assert (found.values[left, 12:] == 0.25).all()
        assert found.scores[left].tolist() == (2 * keys[left]).tolist()
        assert not found.founds[3]


def test_state_of_another_optimizer_is_not_loaded(store, new_store, tmp_path):
    storage = external_storage(store)(options(4), Adam())
    storage.insert(torch.tensor([1]), torch.tensor([0]), torch.ones(1, 12))
    paths = dumped(storage, tmp_path / "dump")
    for kind, state in (("adagrad", 0.25), ("adam", 1.0)):
        with new_store() as other:
            loaded = external_storage(other)(options(4), Adam(kind=kind))
            loaded.load(0, *paths, include_optim=True)
            value = loaded.find(torch.tensor([1]), torch.tensor([0]), CopyMode.VALUE).values
            assert (value[0, :4] == 1).all()
            assert (value[0, 4:] == state).all()


def test_what_is_refused(store, tmp_path):
    storage = external_storage(store)(options(4), Adam())
    storage.insert(torch.tensor([1]), torch.tensor([0]), torch.ones(1, 12))
    with pytest.raises(ValueError, match="'dynamicemb0' in .* does not hold rows by key of 24 values"):
        external_storage(store)(options(8), Adam())
    with pytest.raises(ValueError, match=r"one score here, got scores of shape \(1, 2\)"):
        storage.insert(torch.tensor([1]), torch.tensor([0]), torch.ones(1, 12), torch.ones(1, 2))
    paths = dumped(storage, tmp_path / "dump")
    other = external_storage(store, "other")(options(4, dist_type="continuous"), Adam())
    with pytest.raises(ValueError, match="dist_type='roundrobin', and table 0 has 'continuous'"):
        other.load(0, *paths, include_optim=True)
    (tmp_path / "dump" / "values").write_bytes(bytes(15))
    with pytest.raises(ValueError, match="values does not hold 1 rows of 4 numbers"):
        storage.load(0, *paths, include_optim=True)
    with pytest.raises(FileNotFoundError, match="no keys at emb_key_path"):
        storage.load(0, None, str(tmp_path / "none"), *paths[2:])
