"""Lookups and changes of bags, against a plain model and torch; how a batch runs must not show in any bit."""

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bag_model
from support.model import assert_same_bits
from support.page_cache import drop_caches
from support.stores import close_quietly

import shardemb
from shardemb.compute import plan
from shardemb.engine import planned
from shardemb.engine.planned import Read
from shardemb.initializers import Constant, Uniform
from shardemb.optim import SGD, Adam

ROWS, DIM = 300, 5
EVERYTHING = np.arange(ROWS)
MODES = ["sum", "mean", "max", "sqrtn"]


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut batches into as many tasks as there can be, and let a scratch have a few rows."""
    monkeypatch.setattr(plan, "TASK_BYTES", 64)
    monkeypatch.setattr(planned, "SCRATCH_BYTES", 7 * 4 * DIM)


def new_table(store, **more):
    """Make a table some of whose rows are in slots and most of which were never written."""
    arguments = {"optimizer": SGD(lr=1.0), "initializer": Uniform(-1, 1, seed=1)} | more
    table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, **arguments)
    rng = np.random.default_rng(3)
    some = rng.integers(0, ROWS, 60)
    table.write(some, rng.normal(size=(60, DIM)).round(1))
    return table


def bag_batches(rng, bags=40, longest=30):
    lengths = rng.integers(0, longest, bags)
    ids = np.minimum(rng.zipf(1.3, lengths.sum()), ROWS) - 1
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return ids, offsets, rng.normal(size=ids.size).astype(np.float32)


# ---- against a model ------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """Draw the arguments of a call, and the seed of what they hold."""
    bags = draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(0, 5), min_size=bags, max_size=bags))
    mode = draw(st.sampled_from(MODES))
    return {
        "lengths": lengths,
        "mode": mode,
        "weighted": mode != "max" and draw(st.booleans()),
        "padding": draw(st.sampled_from([None, 0, -1, 4])),
        "last": draw(st.booleans()),
        "two": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def arguments_of(call, rows=8):
    """Return positional and named arguments, and flat ids, bounds and weights for the model."""
    rng = np.random.default_rng(call["seed"])
    lengths = [3] * len(call["lengths"]) if call["two"] else call["lengths"]
    ids = rng.integers(0, rows, sum(lengths))
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = rng.normal(size=ids.size).astype(np.float32) if call["weighted"] else None
    named = {"mode": call["mode"], "padding_idx": call["padding"]}
    shape = (len(lengths), 3) if call["two"] else ids.shape
    if weights is not None:
        named["weights"] = weights.reshape(shape)
    if call["two"]:
        return (ids.reshape(shape), None), named, ids, bounds, weights
    named["include_last_offset"] = call["last"]
    return (ids, bounds if call["last"] else bounds[:-1]), named, ids, bounds, weights


def test_lookups_and_updates_agree_with_a_plain_model(new_store):
    with new_store() as store:
        table = store.create_table(
            "t", num_embeddings=8, embedding_dim=3, optimizer=SGD(lr=1.0), initializer=Uniform(-1, 1, seed=2)
        )

        @settings(max_examples=120)
        @given(call=calls(), by_frequency=st.booleans())
        def check(call, by_frequency):
            positional, named, ids, bounds, weights = arguments_of(call)
            padding = None if call["padding"] is None else call["padding"] % 8
            before = table.lookup(np.arange(8))
            expected, winners = bag_model.pool(before[ids], ids, bounds, call["mode"], weights, padding)
            assert_same_bits(table.lookup_bag(*positional, **named), expected)
            out = np.full_like(expected, np.nan)
            assert table.lookup_bag(*positional, **named, out=out) is out
            assert_same_bits(out, expected)
            grads = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
            table.update_bag(*positional, grads, **named, scale_grad_by_freq=by_frequency)
            model = bag_model.row_gradients(
                ids, bounds, grads, call["mode"], weights, padding, winners, by_frequency=by_frequency
            )
            after = before.astype(np.float64)
            for row, gradient in model.items():
                after[row] -= gradient
            np.testing.assert_allclose(table.lookup(np.arange(8)), after, rtol=1e-4, atol=1e-4)

        check()


@pytest.mark.parametrize(("mode", "weights"), [("mean", [1, -1, 1]), ("sqrtn", [0, 0, 1])])
def test_rows_whose_weights_add_up_to_nothing_take_no_gradients(store, mode, weights):
    """Their bag is zeros whatever they are. Unchanged to the bit: a gradient of NaN or infinity would stay."""
    table = new_table(store)
    before = table.lookup([1, 2, 3])
    named = {"mode": mode, "weights": np.float32(weights)}
    np.testing.assert_array_equal(table.lookup_bag([1, 2, 3], [0, 2], **named)[0], np.zeros(DIM))
    table.update_bag([1, 2, 3], [0, 2], np.ones((2, DIM), np.float32), **named)
    assert_same_bits(table.lookup([1, 2]), before[:2])
    np.testing.assert_allclose(table.lookup([3])[0], before[2] - 1, rtol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn"])
def test_gradients_of_weights_are_differences(store, mode):
    """Central differences in float64 of the formula of the lookup."""
    table = new_table(store)
    rng = np.random.default_rng(5)
    ids, offsets, weights = bag_batches(rng, bags=6, longest=5)
    weights = np.abs(weights) + np.float32(0.5)
    bounds = np.append(offsets, ids.size)
    grads = rng.normal(size=(6, DIM)).astype(np.float32)
    rows = table.lookup(ids).astype(np.float64)

    def loss(given):
        total = 0.0
        for bag in range(6):
            w, e = given[bounds[bag] : bounds[bag + 1]], rows[bounds[bag] : bounds[bag + 1]]
            if len(w):
                divisor = {"sum": 1.0, "mean": w.sum(), "sqrtn": np.sqrt((w * w).sum())}[mode]
                total += ((w[:, np.newaxis] * e).sum(axis=0) / divisor) @ grads[bag].astype(np.float64)
        return total

    found = table.bag_weight_gradient(ids, offsets, grads, mode=mode, weights=weights)
    exact, step = weights.astype(np.float64), 1e-6
    for i in range(ids.size):
        away = np.zeros(ids.size)
        away[i] = step
        assert found[i] == pytest.approx(
            (loss(exact + away) - loss(exact - away)) / (2 * step), rel=1e-4, abs=1e-4
        )
    padded = table.bag_weight_gradient(ids, offsets, grads, padding_idx=int(ids[0]))
    assert not padded[ids == ids[0]].any()
    plain = table.bag_weight_gradient(ids, offsets, grads)
    assert_same_bits(padded[ids != ids[0]], plain[ids != ids[0]])


# ---- against torch ----------------------------------------------------------------------------------------------


def pooled_by_hand(torch, ids, parameter, offsets, weights, padding, mode):
    """Pool the rows of `embedding`: `embedding_bag` of 2.13 scales gradients by the counts of other ids."""
    padding = None if padding is None else padding % len(parameter)
    rows = torch.nn.functional.embedding(ids, parameter, padding_idx=padding, scale_grad_by_freq=True)
    kept = torch.ones(len(ids)) if padding is None else (ids != padding).float()
    rows = rows * (kept if weights is None else kept * weights)[:, None]
    lengths = torch.diff(torch.cat([offsets, torch.tensor([len(ids)])]))
    bag_of = torch.repeat_interleave(torch.arange(len(offsets)), lengths)
    sums = torch.zeros(len(offsets), rows.shape[1]).index_add(0, bag_of, rows)
    counts = torch.zeros(len(offsets)).index_add(0, bag_of, kept)
    return sums / counts.clamp(min=1)[:, None] if mode == "mean" else sums


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 2, -1])
def test_it_agrees_with_torch(new_store, mode, padding):
    torch = pytest.importorskip("torch")
    bag = torch.nn.functional.embedding_bag
    with new_store() as store:
        table = new_table(store)
        for seed in range(6):
            rng = np.random.default_rng(seed)
            ids, offsets, weights = bag_batches(rng, bags=7, longest=9)
            weights = weights if mode == "sum" and seed % 2 else None
            by_frequency = mode != "max" and seed % 3 == 2
            before = table.lookup(EVERYTHING)
            parameter = torch.nn.Parameter(torch.from_numpy(before.copy()))
            tensor = None if weights is None else torch.nn.Parameter(torch.from_numpy(weights.copy()))
            given = torch.from_numpy(ids), parameter, torch.from_numpy(offsets)
            theirs = bag(*given, mode=mode, per_sample_weights=tensor, padding_idx=padding)
            if by_frequency:
                theirs = pooled_by_hand(torch, *given, tensor, padding, mode)
            named = {"mode": mode, "weights": weights, "padding_idx": padding}
            ours = table.lookup_bag(ids, offsets, **named)
            # Torch adds the rows of a bag in another order.
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
            grads = rng.normal(size=ours.shape).astype(np.float32)
            theirs.backward(torch.from_numpy(grads))
            if tensor is not None:
                found = table.bag_weight_gradient(ids, offsets, grads, padding_idx=padding)
                np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)
            table.update_bag(ids, offsets, grads, **named, scale_grad_by_freq=by_frequency)
            expected = before - parameter.grad.numpy()
            np.testing.assert_allclose(table.lookup(EVERYTHING), expected, rtol=1e-4, atol=1e-4)


def test_updates_by_id_scale_and_drop_gradients_as_torch(store):
    torch = pytest.importorskip("torch")
    table = new_table(store)
    ids, _, _ = bag_batches(np.random.default_rng(1))
    before = table.lookup(EVERYTHING)
    parameter = torch.nn.Parameter(torch.from_numpy(before.copy()))
    rows = torch.nn.functional.embedding(
        torch.from_numpy(ids), parameter, padding_idx=1, scale_grad_by_freq=True
    )
    grads = np.random.default_rng(2).normal(size=(ids.size, DIM)).astype(np.float32)
    rows.backward(torch.from_numpy(grads))
    table.update(ids, grads, padding_idx=1, scale_grad_by_freq=True)
    np.testing.assert_allclose(
        table.lookup(EVERYTHING), before - parameter.grad.numpy(), rtol=1e-4, atol=1e-5
    )


# ---- how it runs does not show ----------------------------------------------------------------------------------


def use_bags(path, *, rows_per_shard=64, **options):
    """Look bags up and train on them in every mode; return everything that a user could see of it."""
    found = []
    with shardemb.open(path, **options) as store:
        table = new_table(
            store, optimizer=Adam(lr=0.1), rows_per_shard=rows_per_shard, counters=True, padding_idx=7
        )
        store.commit()
        rng = np.random.default_rng(4)
        for mode in MODES:
            ids, offsets, weights = bag_batches(rng)
            weights = None if mode == "max" else weights
            for given in {id(None): None, id(weights): weights}.values():
                named = {"mode": mode, "weights": given}
                found.append(table.lookup_bag(ids, offsets, **named))
                grads = rng.normal(size=found[-1].shape).astype(np.float32)
                if mode != "max":
                    found.append(table.bag_weight_gradient(ids, offsets, grads, **named))
                for by_frequency in (False, True):
                    table.update_bag(ids, offsets, grads, **named, scale_grad_by_freq=by_frequency)
            store.commit()
        found += [table.state(name, EVERYTHING) for name in ("exp_avg", "exp_avg_sq", "count", "last_step")]
        found.append(table.lookup(EVERYTHING))
    return found


def test_bits_do_not_depend_on_threads_shards_pieces_or_memory(tmp_path, small_pieces):
    expected = use_bags(tmp_path / "a", threads=1, rows_per_shard=ROWS)
    ways = {
        "threads": {"threads": 8},
        "shards": {"threads": 3, "rows_per_shard": 64},
        "spilled": {"threads": 2, "memory_budget": 0},
    }
    for name, options in ways.items():
        for one, other in zip(expected, use_bags(tmp_path / name, **options), strict=True):
            assert_same_bits(one, other)


def test_nor_on_how_large_pieces_are(tmp_path, monkeypatch):
    expected = use_bags(tmp_path / "a", threads=1)
    monkeypatch.setattr(plan, "TASK_BYTES", 64)
    for one, other in zip(expected, use_bags(tmp_path / "b", threads=4), strict=True):
        assert_same_bits(one, other)


def test_spilled_rows_are_read_part_by_part_also_within_a_bag(path, monkeypatch):
    monkeypatch.setattr("shardemb.engine.batch.PAGED_ROWS", 16)
    store = shardemb.open(path, memory_budget=0)
    try:
        table = new_table(store)
        table.write(EVERYTHING, np.random.default_rng(1).normal(size=(ROWS, DIM)))
        table.write([0], np.ones((1, DIM)))  # what is in memory is spilled for it
        assert table.stats()["rows_out"]
        rows = table.lookup(EVERYTHING)
        ids, offsets = np.concatenate([EVERYTHING, [5, 6]]), [0, 0, 1, 299, 301]
        for mode in MODES:
            expected, _ = bag_model.pool(rows[ids], ids, bag_model.bounds_of(offsets, ids.size), mode)
            assert_same_bits(table.lookup_bag(ids, offsets, mode=mode), expected)
            table.write([0], rows[:1])
            assert table.stats()["rows_out"]
    finally:
        close_quietly(store)


def test_rows_that_move_meanwhile_are_read_again(store, monkeypatch):
    """A change of the index while rows are added up lets the lookup start over."""
    table = new_table(store)
    ids, offsets, _ = bag_batches(np.random.default_rng(1))
    expected = table.lookup_bag(ids, offsets)
    shards = table._state.shards
    gather, calls = shards.gather, []

    def disturbed(*arguments):
        gather(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            arguments[2][:] = np.nan
            shards.overlay._version += 1

    monkeypatch.setattr(shards, "gather", disturbed)
    assert_same_bits(table.lookup_bag(ids, offsets), expected)
    assert len(calls) > 1


def test_bags_are_those_of_their_rows_while_rows_are_spilled_evicted_and_folded(path):
    store = shardemb.open(path, memory_budget=0, log_bytes=1)
    table = store.create_table("t", num_embeddings=3000, embedding_dim=2, rows_per_shard=64)
    rows = np.arange(3000, dtype=np.float32)[:, np.newaxis].repeat(2, 1)
    table.write(np.arange(3000), rows)
    stop, wrong = threading.Event(), []

    def read(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set() and not wrong:
            ids = rng.integers(0, 3000, 50)
            found = table.lookup_bag(np.stack([ids] * 3, axis=1), mode="max")
            if not ((found == rows[ids]) | (found == rows[ids] + 0.5)).all():
                wrong.append(ids)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    for each in readers:
        each.start()
    rng = np.random.default_rng(9)
    for number in range(25):
        some = rng.integers(0, 3000, 400)
        table.write(some, rows[some] + np.float32(0.5 * (number % 2)))
        if number % 3 == 0:
            store.commit()
    stop.set()
    for each in readers:
        each.join()
    close_quietly(store)
    assert not wrong


def test_cold_batches_request_their_pages_first(path):
    with shardemb.open(path, warm=False) as store:
        table = store.create_table("t", num_embeddings=100_000, embedding_dim=64)
        ids = np.random.default_rng(1).integers(0, 100_000, 2000)
        table.write(np.arange(100_000), np.arange(100_000, dtype=np.float32)[:, np.newaxis].repeat(64, 1))
        store.commit()
        store.checkpoint()
    with shardemb.open(path, mode="r", warm=False) as store:
        table = store["t"]
        drop_caches(table)
        expected = ids.reshape(100, 20).sum(axis=1, dtype=np.float32)
        assert_same_bits(table.lookup_bag(ids.reshape(100, 20))[:, 5], expected)
        assert table.stats()["cold_lookups"] == 1
        assert table.stats()["rows_looked_up"] == 2000


every_precision = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@every_precision
def test_a_reader_sees_the_bags_of_its_commit(path, dtype):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, dtype=dtype)
        table.write([1, 2], np.ones((2, DIM)))
        store.commit()
        with shardemb.open(path, mode="r") as reader:
            table.write([1], np.full((1, DIM), 5.0))
            store.commit()
            assert reader["t"].lookup_bag([1, 2, 3], [0])[0, 0] == 2
            reader.refresh()
            assert reader["t"].lookup_bag([1, 2, 3], [0])[0, 0] == 6


@every_precision
def test_a_reader_sees_nothing_of_what_a_writer_fills(path, dtype, monkeypatch):
    monkeypatch.setattr("shardemb.engine.filling.LEAST_BYTES", 8192)
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=4000, embedding_dim=DIM, dtype=dtype)
        store.commit()
        ids = np.arange(4000).reshape(40, 100)
        with shardemb.open(path, mode="r") as reader:
            assert not reader["t"].lookup_bag(ids).any()
            table.write(np.arange(4000), np.ones((4000, DIM)))
            for mode in MODES:
                assert not reader["t"].lookup_bag(ids, mode=mode).any()
            store.commit()
            reader.refresh()
            assert (reader["t"].lookup_bag(ids) == 100).all()


@every_precision
def test_nor_of_what_is_filled_while_rows_are_added_up(path, dtype, monkeypatch):
    monkeypatch.setattr("shardemb.engine.filling.LEAST_BYTES", 8192)
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=4000, embedding_dim=DIM, dtype=dtype)
        store.commit()
        with shardemb.open(path, mode="r") as reader:
            hidden = reader["t"]._state.shards.hidden
            look, looks = hidden.look, []

            def look_and_write(spec):
                looks.append(look(spec))
                if len(looks) == 1:
                    table.write(np.arange(4000), np.ones((4000, DIM)))
                return looks[-1]

            monkeypatch.setattr(hidden, "look", look_and_write)
            assert not reader["t"].lookup_bag(np.arange(4000), [0]).any()
        store.rollback()


@pytest.mark.parametrize(
    "named", [{}, {"weights": np.ones(5)}, {"mode": "max"}, {"scale_grad_by_freq": True}]
)
@every_precision
def test_rows_count_how_often_they_are_in_bags(store, named, dtype):
    table = new_table(store, counters=True, initializer=None, dtype=dtype)
    before = table.state("count", [1, 2, 3, 4])
    table.update_bag([1, 2, 1, 3, 1], [0, 2], np.ones((2, DIM)), **named)
    table.update_bag([1, 2, 1, 3, 1], [0, 2], np.ones((2, DIM)), **named)
    assert (table.state("count", [1, 2, 3, 4]) - before).tolist() == [6, 2, 2, 0]
    assert table.state("last_step", [1, 3]).tolist() == [2, 2]


def test_nothing_as_large_as_all_rows_is_made(store, monkeypatch):
    table = new_table(store)
    ids = np.random.default_rng(1).integers(0, ROWS, 20_000)
    made = []
    monkeypatch.setattr(planned, "SCRATCH_BYTES", 64 * 4 * DIM)
    empty = np.empty

    def spy(shape, *arguments, **named):
        made.append(int(np.prod(shape)))
        return empty(shape, *arguments, **named)

    monkeypatch.setattr(np, "empty", spy)
    table.lookup_bag(ids, [0, 10_000])
    assert max(made) <= 64 * DIM


def test_reads_and_bags_are_carried_out_alike():
    """Both kinds of reads have what a batch asks of them."""
    names = {name for name in vars(planned.Reading) if not name.startswith("_")}
    from shardemb.engine.bags import PooledRead, ProductRead

    for kind in (Read, PooledRead, ProductRead):
        assert names <= set(dir(kind)), kind


# ---- padding and ids out of range -------------------------------------------------------------------------------


def test_the_row_of_padding_is_zeros_until_it_is_written_and_takes_no_gradients(path):
    with shardemb.open(path) as store:
        table = store.create_table(
            "t",
            num_embeddings=10,
            embedding_dim=2,
            optimizer=SGD(lr=1.0),
            initializer=Uniform(1, 2),
            padding_idx=-2,
        )
        assert table.padding_idx == 8
        assert not table.lookup([8]).any()
        assert table.lookup([7, 9]).all()
        store.commit()
    with shardemb.open(path) as store:
        table = store["t"]
        assert table.padding_idx == 8
        before = table.lookup(np.arange(10))
        assert_same_bits(
            table.lookup_bag([8, 1, 8], [0, 2], mode="mean"), np.stack([before[1], before[8] * 0])
        )
        table.update([8, 1], np.ones((2, 2)))
        table.update_bag([8, 2], [0], np.ones((1, 2)))
        assert_same_bits(table.lookup([8, 1, 2]), before[[8, 1, 2]] - np.float32([[0], [1], [1]]))
        table.write([8], np.ones((1, 2)))
        assert table.lookup([8]).all()
        table.update([8, 1], np.ones((2, 2)), padding_idx=1)  # a call may say another
        assert not table.lookup([8]).any()
        store.commit()
        store.reshard("t", rows_per_shard=128)
        assert store["t"].padding_idx == 8
        table.resize(5, drop_rows=True)
        assert table.padding_idx is None
        store.commit()


def test_an_array_is_taken_with_its_row_of_padding(store):
    table = store.create_table(
        "t", num_embeddings=3, embedding_dim=2, initializer=np.ones((3, 2), np.float32), padding_idx=1
    )
    assert table.lookup([1]).all()
    assert table.lookup_bag([[0, 1, 2]]).tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("initializer", [Uniform(-1, 1, seed=1), Constant(0.0), Constant(2.0)])
def test_ids_out_of_range_may_be_clipped_or_get_a_row(store, initializer):
    table = new_table(store, initializer=initializer)
    rows, ids = table.lookup(EVERYTHING), np.array([[-5, 3, ROWS], [ROWS - 1, 2**40, 0]])
    expected = rows[np.clip(ids, 0, ROWS - 1)]
    assert_same_bits(table.lookup(ids, out_of_range="clip"), expected)
    assert_same_bits(
        table.lookup_bag(ids, out_of_range="clip")[1], bag_model.pool(expected[1], ids[1], [0, 3])[0][0]
    )
    default = np.arange(DIM, dtype=np.float32)
    expected[(ids < 0) | (ids >= ROWS)] = default
    assert_same_bits(table.lookup(ids, out_of_range=default.tolist()), expected)
    for mode in MODES:
        pooled = bag_model.pool(expected.reshape(-1, DIM), ids.reshape(-1), [0, 3, 6], mode)[0]
        assert_same_bits(table.lookup_bag(ids, mode=mode, out_of_range=default), pooled)
    # Padding is a row, and no id that only stands in for one.
    pooled = bag_model.pool(expected.reshape(-1, DIM), ids.reshape(-1), [0, 3, 6], "sum", None, 0)[0]
    assert_same_bits(table.lookup_bag(ids, out_of_range=default, padding_idx=0), pooled)
    assert_same_bits(table.lookup(np.array([2**64 - 1], np.uint64), out_of_range="clip"), rows[-1:])


# ---- the first maximum, as rows are now -------------------------------------------------------------------------


def test_maxima_are_looked_up_again_if_rows_change_before_the_update(store):
    table = new_table(store)
    given = shardemb.Bags([1, 2], [0], "max")
    from shardemb.engine import bags, batch

    table.write([1, 2], [[1.0] * DIM, [2.0] * DIM])
    change = bags.plan_change(
        table._state, given, np.ones((1, DIM)), scale_grad_by_freq=False, check_finite=True
    )
    table.write([1], [[3.0] * DIM])
    batch.change(store._session.runtime, [change])
    assert table.lookup([1, 2])[:, 0].tolist() == [2.0, 2.0]


def test_bags_are_a_frozen_description():
    bags = shardemb.Bags([[1, 2]], mode="mean")
    with pytest.raises(dataclasses.FrozenInstanceError):
        bags.mode = "sum"
