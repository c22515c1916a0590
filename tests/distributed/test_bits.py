"""A distributed store has the bits of one local store: rows, state, norms, for any number of partitions and owners."""

import numpy as np
import pytest

import shardemb
from shardemb import Bags, optim
from shardemb.initializers import GlorotUniform, TruncatedNormal, Uniform

ROWS, DIM = 53, 6
IDS = np.arange(ROWS)

OPTIMIZERS = [
    optim.SGD(lr=0.5),
    optim.Adam(lr=0.1, weight_decay=0.01),
    optim.AdamW(lr=0.1, clip_norm=0.5),
    optim.RowWiseAdagrad(lr=0.3),
    optim.FTRL(lr=0.1, l1=0.01),
    optim.Lion(lr=0.01, maximize=True),
]


@pytest.fixture
def both(new_store, tmp_path):
    """The same table in a distributed store and in a local one."""
    with shardemb.open(tmp_path / "local.zarr") as local:
        yield new_store(), local
        local.rollback()


def create(stores, name="t", **options):
    options = {"num_embeddings": ROWS, "embedding_dim": DIM, "initializer": Uniform(-1, 1, seed=3)} | options
    return [store.create_table(name, **options) for store in stores]


def assert_same(one, other):
    """Compare all rows of two tables, and what the optimizer keeps."""
    assert one.lookup(IDS).tobytes() == other.lookup(IDS).tobytes()
    assert one.step == other.step
    for column in () if other.optimizer is None else other.optimizer.state_columns(DIM):
        np.testing.assert_array_equal(one.state(column, IDS), other.state(column, IDS))


def batch(generator, size=40):
    ids = np.minimum(generator.geometric(0.1, size), ROWS) - 1  # many times the same
    return ids, generator.normal(size=(size, DIM)).astype(np.float32)


@pytest.mark.parametrize(
    "initializer", [Uniform(-1, 1, seed=3), TruncatedNormal(0, 1), GlorotUniform(seed=2), None]
)
def test_rows_that_were_never_written(both, initializer):
    for name in ("t", "u"):
        assert_same(*create(both, name, initializer=initializer))
    distributed, local = both
    distributed.commit(step=1)
    local.commit(step=1)
    for store in both:  # a stream is never used twice
        store.drop_table("t")
    assert_same(*create(both, initializer=initializer))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
def test_all_kinds_of_changes(both, optimizer):
    tables, generator = create(both, optimizer=optimizer, padding_idx=7), np.random.default_rng(1)
    for _ in range(3):
        ids, gradients = batch(generator)
        offsets = np.array([0, 3, 3, 20])
        weights = generator.normal(size=ids.size).astype(np.float32)
        by_bag = gradients[:4]
        for table in tables:
            table.update(ids, gradients)
            table.update(ids, gradients, scale_grad_by_freq=True)
            for mode in ("sum", "mean", "max", "sqrtn"):
                table.update_bag(ids, offsets, by_bag, mode=mode)
            table.update_bag(ids, offsets, by_bag, weights=weights, scale_grad_by_freq=True)
            table.update([], np.empty((0, DIM)))
            table.write(ids[:3], gradients[:3])
        norms = [table.update(ids, gradients, scale=2.0) for table in tables]
        assert norms[0] == norms[1]
    assert_same(*tables)


def test_lookups_of_bags(both):
    tables, generator = create(both, padding_idx=7), np.random.default_rng(2)
    ids, gradients = batch(generator)
    offsets, weights = np.array([0, 3, 3, 20]), generator.normal(size=ids.size).astype(np.float32)
    for mode in ("sum", "mean", "max", "sqrtn"):
        one, other = (table.lookup_bag(ids, offsets, mode=mode) for table in tables)
        assert one.tobytes() == other.tobytes()
    one, other = (table.lookup_bag(ids, offsets, weights=weights) for table in tables)
    assert one.tobytes() == other.tobytes()
    for mode in ("sum", "mean", "sqrtn"):
        given = ids, offsets, gradients[:4]
        one, other = (table.bag_weight_gradient(*given, mode=mode, weights=weights) for table in tables)
        assert one.tobytes() == other.tobytes()


def test_several_tables_in_one_step(both):
    create(both, "a", optimizer=optim.Adam(lr=0.1))
    create(both, "b", optimizer=optim.Adagrad(lr=0.1), dtype="bfloat16")
    generator = np.random.default_rng(3)
    for max_norm in (None, 0.5, 1e6):
        rows, bags = batch(generator), batch(generator)
        given = {"a": rows, "b": (Bags(bags[0].reshape(8, 5), mode="mean"), bags[1][:8])}
        norms = [store.update(given, max_norm=max_norm, extra_norm_sq=0.25) for store in both]
        assert norms[0] == norms[1]
        assert both[0].gradient_norm(given) == both[1].gradient_norm(given)
    for name in ("a", "b"):
        assert_same(both[0][name], both[1][name])
    distributed, local = (store.lookup({"a": [[1, 2]], "b": [3, 3]}) for store in both)
    for name, found in local.items():
        assert distributed[name].tobytes() == found.tobytes()
        assert distributed[name].shape == found.shape


def test_a_step_whose_norm_is_not_finite_is_skipped_everywhere(both):
    tables = create(both, optimizer=optim.Adam())
    for store in both:
        assert np.isinf(store.update({"t": ([1], np.full((1, DIM), np.inf, np.float32))}, scale=1.0))
        with pytest.raises(ValueError, match="with scale=1.0"):
            store.update({"t": ([1], np.full((1, DIM), np.inf, np.float32))}, max_norm=1.0)
    assert tables[0].step == tables[1].step == 0


@pytest.mark.parametrize(("owners", "partitions"), [(1, 1), (1, 3), (2, 2), (2, 7), (2, 64)])
def test_any_number_of_owners_and_partitions(new_store, cluster, tmp_path, owners, partitions):
    distributed = new_store(owners=cluster.owners(tmp_path, owners), partitions=partitions)
    with shardemb.open(tmp_path / "local.zarr") as local:
        tables, generator = (
            create((distributed, local), optimizer=optim.Adam(lr=0.1)),
            np.random.default_rng(4),
        )
        for step in range(3):
            given = batch(generator)
            for table in tables:
                table.update(*given)
            distributed.commit(step=step)
            local.commit(step=step)
        assert_same(*tables)


def test_counters_count_each_place_of_a_row(both):
    tables = create(both, optimizer=optim.SGD(), counters=True)
    for table in tables:
        table.update(*batch(np.random.default_rng(5)))
    assert_same(*tables)
    with pytest.raises(ValueError, match="has counters"):
        tables[0].update([1], np.ones((1, DIM)), scale=2.0)
