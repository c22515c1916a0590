"""Loops whose batches are read ahead: what they yield, what they train, and how they end."""

import copy
import gc
import signal
import traceback
import types
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.torch import Embedding, Optimizer, Pipeline, prefetching  # noqa: E402

ROWS, DIM = 200, 4


def new_table(store, name="t", **options):
    return store.create_table(
        name,
        num_embeddings=ROWS,
        embedding_dim=DIM,
        optimizer=shardemb.optim.Adam(lr=0.1),
        initializer=shardemb.initializers.Uniform(-1, 1, seed=3),
        **options,
    )


@pytest.fixture
def words(store):
    return Embedding(new_table(store))


def batches(count=8, size=5):
    return list(torch.randint(ROWS, (count, size), generator=torch.Generator().manual_seed(1)))


def recorded(monkeypatch, table):
    """Return the ids that are read ahead from now on, and whether for updates."""
    seen = []

    def prefetch(_, ids, *, for_update=False):
        seen.append((np.asarray(ids).tolist(), for_update))

    monkeypatch.setattr(type(table), "prefetch", prefetch)
    return seen


class Loader:
    """A loader with a state, in which it also counts what it was asked for."""

    def __init__(self, given):
        self.given, self.state, self.taken = given, {"at": 0}, Counter()

    def __len__(self):
        return len(self.given)

    def __iter__(self):
        while self.state["at"] < len(self.given):
            self.state["at"] += 1
            yield self.given[self.state["at"] - 1]
        self.state["at"] = 0

    def state_dict(self):
        return self.state  # its own, which goes on

    def load_state_dict(self, state):
        self.state = copy.copy(state)


# ---- what it yields -------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(count=st.integers(0, 9), depth=st.integers(1, 12), stop=st.integers(0, 10))
def test_it_yields_the_same_objects_in_the_same_order_for_any_depth(new_store, count, depth, stop):
    given = batches(count)
    with new_store() as store:
        ahead = prefetching(given, Embedding(new_table(store)), depth)
        assert len(ahead) == count
        for _ in range(2):  # each loop begins again
            got = [each for _, each in zip(range(stop), ahead, strict=False)]
            assert [id(each) for each in got] == [id(each) for each in given[:stop]]


def test_it_asks_the_loader_for_depth_batches_more_than_it_has_yielded(words):
    taken = []

    def loader():
        for each in batches():
            taken.append(each)
            yield each

    counts = [len(taken) for _ in prefetching(loader(), words, depth=3)]
    assert counts == [4, 5, 6, 7, 8, 8, 8, 8]


def test_an_iterator_goes_on_after_a_break(words):
    given = batches()
    ahead = prefetching(iter(given), words)
    first = [each for _, each in zip(range(3), ahead, strict=False)]
    assert [id(each) for each in [*first, *ahead]] == [id(each) for each in given[:3] + given[3:]]


def test_pinned_or_not_batches_are_passed_on_as_they_are(words):
    pair = [torch.tensor([1, 2]), torch.zeros(2)]
    (got,) = prefetching([pair], words)
    assert got is pair


# ---- what is read ---------------------------------------------------------------------------------------------


class Two(torch.nn.Module):
    def __init__(self, users, items):
        super().__init__()
        self.users, self.items = Embedding(users), Embedding(items)


class Jagged:
    """As much of TorchRec's KeyedJaggedTensor as is needed."""

    def __init__(self, keys, values, lengths):
        self.keys, self.values, self.lengths = (lambda: keys), (lambda: values), (lambda: lengths)


def test_the_ids_of_one_table_are_the_first_tensor_of_integers(words, monkeypatch):
    seen = recorded(monkeypatch, words.table)
    ids = torch.tensor([3, 4])
    labels = torch.tensor([1])
    fields = types.SimpleNamespace(dense=torch.zeros(2), ids=ids, labels=labels)
    for batch in (ids, (ids, labels), [torch.zeros(2), ids, labels], fields):
        seen.clear()
        assert list(prefetching([batch], words)) == [batch]
        assert seen == [([3, 4], True)]


def test_mappings_and_jagged_tensors_are_known_by_name(store, monkeypatch):
    model = Two(new_table(store, "u"), new_table(store, "i"))
    seen = recorded(monkeypatch, model.users.table)
    jagged = Jagged(["items", "other", "users"], torch.arange(6), torch.tensor([1, 1, 0, 1, 2, 1]))
    named = {
        "users": torch.tensor([5]),
        "label": torch.tensor([0]),
        "items": (torch.tensor([7, 8]), torch.tensor([0])),
    }
    cases = {
        0: (jagged, [[0, 1], [3, 4, 5]]),
        1: ((torch.zeros(2), jagged), [[0, 1], [3, 4, 5]]),
        2: ({"sparse": jagged}, [[0, 1], [3, 4, 5]]),
        3: (named, [[5], [7, 8]]),
    }
    for batch, expected in cases.values():
        seen.clear()
        list(prefetching([batch], torch.nn.Sequential(model)[0]))
        assert [ids for ids, _ in seen] == expected


def test_a_function_may_say_which_ids(store, monkeypatch):
    model = Two(new_table(store, "u"), new_table(store, "i"))
    seen = recorded(monkeypatch, model.users.table)

    def ids(batch):
        return {
            model.users: batch,
            model.items.table: shardemb.Bags([4, 5], [0]),
            "items": np.array([9]),
        }

    list(prefetching([torch.tensor([1])], model, ids=ids))
    assert [each for each, _ in seen] == [[1], [4, 5], [9]]


def test_keys_of_rows_may_be_strings(store, monkeypatch):
    store.create_vocabulary("v", key_type="string")
    table = store.create_table("k", embedding_dim=DIM, vocabulary="v", optimizer=shardemb.optim.SGD(lr=0.1))
    module = Embedding(table)
    seen = recorded(monkeypatch, table)
    list(prefetching([["a", "b"]], module, ids=lambda batch: {module: batch}))
    assert seen == [(["a", "b"], True)]


def test_updates_are_only_prepared_for_training(words, monkeypatch):
    seen = recorded(monkeypatch, words.table)
    list(prefetching([torch.tensor([1])], words.eval()))
    with torch.no_grad():
        list(prefetching([torch.tensor([1])], words.train()))
    assert [for_update for _, for_update in seen] == [False, False]


def test_a_store_for_reading_is_read_ahead(path):
    with shardemb.open(path) as store:
        new_table(store)
        store.commit()
    with shardemb.open(path, mode="r") as store:
        words = Embedding(store["t"])
        given = batches()
        for got, ids in zip(prefetching(given, words), given, strict=True):
            assert torch.equal(words(got), torch.from_numpy(store["t"].lookup(ids.numpy())))


# ---- it gives the same bits -----------------------------------------------------------------------------------


def train(store, loader, ahead):
    torch.manual_seed(0)
    words = Embedding(new_table(store))
    dense = torch.nn.Sequential(torch.nn.Linear(DIM, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
    optimizers = [Optimizer(words), torch.optim.SGD(dense.parameters(), lr=0.1)]
    losses = []
    for _ in range(2):
        for ids in prefetching(loader, words, 3) if ahead else loader:
            for each in optimizers:
                each.zero_grad()
            loss = dense(words(ids)).square().mean()
            loss.backward()
            for each in optimizers:
                each.step()
            losses.append(loss.item())
    return losses, words.table[:].tobytes()


@pytest.mark.parametrize("budget", [None, 2**20], ids=["default", "small"])
def test_training_gives_the_same_bits(tmp_path, budget):
    results = []
    for ahead in (False, True):
        torch.manual_seed(7)
        loader = torch.utils.data.DataLoader(
            torch.arange(ROWS) // 3, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        with shardemb.open(tmp_path / f"{ahead}.zarr", memory_budget=budget) as store:
            results.append(train(store, loader, ahead))
            store.commit()
    assert results[0] == results[1]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_may_make_the_batches(words, start):
    loader = torch.utils.data.DataLoader(
        range(40), batch_size=4, num_workers=1, multiprocessing_context=start, timeout=60
    )
    optimizer = Optimizer(words)
    got = []
    for ids in prefetching(loader, words):
        words(ids).sum().backward()
        optimizer.step()
        got += ids.tolist()
        if len(got) == 28:
            break  # the workers end with the loop
    assert got == list(range(28))
    assert words.table.step == 7


# ---- its state ------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(count=st.integers(1, 8), depth=st.integers(1, 10), stop=st.integers(0, 9))
def test_its_state_is_that_of_a_plain_loop(new_store, count, depth, stop):
    given = batches(count)
    plain, inner = Loader(given), Loader(given)
    with new_store() as store:
        ahead = prefetching(inner, Embedding(new_table(store)), depth)
        assert ahead.state_dict() == plain.state_dict()
        for number, _ in enumerate(zip(plain, ahead, strict=True)):
            assert ahead.state_dict() == plain.state_dict() == {"at": number + 1}
            if number == stop:
                break
        assert ahead.state_dict() == plain.state_dict()
        state = ahead.state_dict()
        resumed = prefetching(Loader(given), Embedding(store["t"]), depth)
        resumed.load_state_dict(state)
        fresh = Loader(given)
        fresh.load_state_dict(plain.state_dict())
        assert [id(each) for each in resumed] == [id(each) for each in fresh]


def test_what_waits_is_dropped_with_another_state(words):
    given = batches()
    ahead = prefetching(Loader(given), words)
    assert next(iter(ahead)) is given[0]
    ahead.load_state_dict({"at": 5})
    assert ahead.state_dict() == {"at": 5}
    assert next(iter(ahead)) is given[5]


def test_a_loader_without_state_has_none(words):
    with pytest.raises(TypeError, match=r"a list has no state_dict\(\).*StatefulDataLoader"):
        prefetching([], words).state_dict()
    with pytest.raises(TypeError, match="load_state_dict"):
        prefetching([], words).load_state_dict({})


# ---- how it ends ----------------------------------------------------------------------------------------------


def failing(at, error):
    for number, each in enumerate(batches()):
        if number == at:
            raise error
        yield each


@pytest.mark.parametrize("at", [0, 1, 4, 7])
def test_an_error_of_the_loader_comes_in_its_place_with_its_traceback(words, at):
    got = []
    with pytest.raises(OSError, match="lost") as caught:
        for each in prefetching(failing(at, OSError("lost")), words, depth=3):
            got.append(each)
    assert len(got) == at
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "failing"


def test_a_loop_may_go_on_after_an_error(words):
    class Once:
        def __init__(self):
            self.numbers = iter(range(6))

        def __iter__(self):
            return self

        def __next__(self):
            number = next(self.numbers)
            if number == 2:
                raise ValueError(number)
            return torch.tensor([number])

    def numbers(iterator):
        while True:
            try:
                yield int(next(iterator))
            except StopIteration:
                return
            except ValueError:
                yield "error"

    assert (
        list(numbers(iter(prefetching(Once(), words)))) == list(numbers(Once())) == [0, 1, "error", 3, 4, 5]
    )


def test_ctrl_c_comes_at_once(words):
    def loader():
        yield from batches(2)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        next(iter(prefetching(loader(), words)))


def test_a_loop_that_is_left_lets_go_of_the_loader(words):
    def loader():
        yield from batches()

    iterator = loader()
    ended = weakref.ref(iterator)
    ahead = iter(prefetching(iterator, words))
    next(ahead)
    del iterator, ahead
    gc.collect()
    assert ended() is None


def test_a_store_that_is_closed_meanwhile_is_told_by_the_lookup(store, words):
    ahead = iter(prefetching(batches(), words))
    next(ahead)
    store.commit()
    store.close()
    ids = next(ahead)
    with pytest.raises(shardemb.StoreClosedError):
        words(ids)


def test_rows_that_there_are_not_are_told_by_the_lookup(words):
    first, second = prefetching([torch.tensor([1]), torch.tensor([ROWS])], words)
    words(first)
    with pytest.raises(shardemb.RowIdError):
        words(second)


# ---- what is refused ------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused(store, words):
    for depth in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="depth is the number of batches"):
            prefetching([], words, depth)
    with pytest.raises(TypeError, match="a Linear, has no tables"):
        prefetching([], torch.nn.Linear(1, 1))
    model = Two(words.table, new_table(store, "i"))
    for unknown in (torch.tensor([1]), {"x": torch.tensor([1])}, 5):
        with pytest.raises(TypeError, match=r"does not know which rows.*\['items', 'users'\].*ids=lambda"):
            list(prefetching([unknown], model))
    with pytest.raises(TypeError, match="'x' as a key, which is no table"):
        list(prefetching([torch.tensor([1])], model, ids=lambda batch: {"x": batch}))
    with pytest.raises(TypeError, match="ids must be a tensor of integers"):
        list(prefetching([torch.tensor([1.0])], model, ids=lambda batch: {model.users: batch}))


# ---- pipelines ------------------------------------------------------------------------------------------------


class Squares(torch.nn.Module):
    """Returns (losses, output), as TorchRec's pipelines expect."""

    def __init__(self, table):
        super().__init__()
        self.words = Embedding(table)
        self.dense = torch.nn.Linear(DIM, 1)

    def forward(self, ids):
        output = self.dense(self.words(ids))
        return output.square(), output


def test_a_pipeline_trains_as_a_plain_loop_does(tmp_path):
    results = []
    for piped in (False, True):
        torch.manual_seed(0)
        with shardemb.open(tmp_path / f"{piped}.zarr") as store:
            model = Squares(new_table(store))
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), Optimizer(model)]
            outputs = []
            if piped:
                pipeline, iterator = Pipeline(model, optimizers), iter(batches())
                with pytest.raises(StopIteration):
                    while True:
                        outputs.append(pipeline.progress(iterator).tolist())
            else:
                for ids in batches():
                    for each in optimizers:
                        each.zero_grad()
                    losses, output = model(ids)
                    losses.sum().backward()
                    for each in optimizers:
                        each.step()
                    outputs.append(output.tolist())
            results.append((outputs, model.words.table[:].tobytes()))
            store.commit()
    assert results[0] == results[1]


def test_a_pipeline_with_a_loader_begins_again_after_its_end(words):
    pipeline = Pipeline(words, Optimizer(words), batches(3), loss=lambda model, ids: (model(ids), ids))
    for _ in range(2):
        assert [id(pipeline.progress()) for _ in range(3)] == [
            id(each) for each in pipeline_batches(pipeline)
        ]
        with pytest.raises(StopIteration):
            pipeline.progress()
    assert words.table.step == 6


def pipeline_batches(pipeline):
    return pipeline._loader


def test_iterators_may_take_turns_and_evaluation_changes_nothing(words):
    training, evaluation = batches(4), batches(4)
    pipeline = Pipeline(words, Optimizer(words), loss=lambda model, ids: (model(ids), ids))
    one, other = iter(training), (each for each in evaluation)
    for number in range(4):
        words.train()
        assert pipeline.progress(one) is training[number]
        words.eval()
        assert pipeline.progress(other) is evaluation[number]
    assert words.table.step == 4


def test_a_pipeline_lets_go_of_iterators(words):
    pipeline = Pipeline(words, Optimizer(words), loss=lambda model, ids: (model(ids), ids))
    iterator = (each for each in batches())
    ended = weakref.ref(iterator)
    pipeline.progress(iterator)
    del iterator
    gc.collect()
    assert ended() is None


def test_what_a_pipeline_cannot_use_is_refused(words):
    pipeline = Pipeline(words, Optimizer(words))
    with pytest.raises(TypeError, match="pass a loader when you make it"):
        pipeline.progress()
    with pytest.raises(TypeError, match=r"takes an iterator, such as iter\(loader\), got a list"):
        pipeline.progress(batches())
    with pytest.raises(TypeError, match=r"returns \(losses, output\), got a Tensor"):
        pipeline.progress(iter(batches()))
