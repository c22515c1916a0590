"""What a model's state says about its rows, and checkpoints whose two halves cannot disagree."""

import copy
import io
import os
import random
import signal
import time
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as dcp  # noqa: E402
from support.stores import close_quietly  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.errors import FormatError, ShardEmbError  # noqa: E402
from shardemb.initializers import Uniform  # noqa: E402
from shardemb.optim import Adam  # noqa: E402
from shardemb.storage import files  # noqa: E402

ROWS, DIM = 50, 4
KILLS = int(os.environ.get("SHARDEMB_KILLS", "50")) // 10


class Training:
    """A model with rows and parameters, and all that belongs to its training."""

    def __init__(self, store):
        if "t" not in store:
            store.create_table(
                "t",
                num_embeddings=ROWS,
                embedding_dim=DIM,
                optimizer=Adam(lr=0.1),
                initializer=Uniform(-1, 1, seed=1),
            )
        self.store = store
        self.model = torch.nn.Sequential(
            shardemb.torch.Embedding(store["t"]), torch.nn.Dropout(0.2), torch.nn.Linear(DIM, 1)
        )
        self.dense = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.rows = shardemb.torch.Optimizer(self.model)
        self.schedulers = [
            torch.optim.lr_scheduler.ExponentialLR(each, 0.99) for each in (self.dense, self.rows)
        ]
        self.generator = torch.Generator().manual_seed(1)

    @property
    def parts(self):
        others = {"dense": self.schedulers[0], "rows": self.schedulers[1], "data": self.generator}
        return {"others": others}

    def step(self):
        """Train one step on data that depend on all generators."""
        ids = torch.randint(ROWS, (20,), generator=self.generator)
        target = random.random() + np.random.normal()
        for each in (self.dense, self.rows):
            each.zero_grad()
        loss = ((self.model(ids) - target) ** 2).mean()
        loss.backward()
        shardemb.torch.clip_grad_norm_(self.model, 1.0)
        for each in (self.dense, self.rows, *self.schedulers):
            each.step()
        return loss.item()

    def save(self, path, step, **options):
        return shardemb.torch.save(
            path, self.model, [self.dense, self.rows], self.store, step, **self.parts, **options
        )

    def load(self, path, **options):
        return shardemb.torch.load(
            path, self.model, [self.dense, self.rows], self.store, **self.parts, **options
        )


def seed():
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


@pytest.fixture
def training(store):
    seed()
    return Training(store)


def reloaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---- references -------------------------------------------------------------------------------------------------


def test_a_state_of_a_model_refers_to_its_rows(training, store):
    training.step()
    commit = store.commit(step=5)
    state = reloaded(training.model.state_dict())
    assert sorted(state) == ["0._extra_state", "2.bias", "2.weight"]
    assert state["0._extra_state"] == [
        {
            "kind": "rows of a table of shardemb",
            "path": str(store.path),
            "store": store.uuid,
            "table": "t",
            "commit": commit.id,
            "step": 5,
            "updates": 1,
            "changed_since": False,
        }
    ]
    other = Training(store)
    other.model.load_state_dict(state)
    torch.testing.assert_close(other.model[2].weight, training.model[2].weight)


def test_a_state_of_other_rows_is_refused_with_the_reason(training, store, tmp_path):
    training.step()
    store.commit(step=1)
    state = copy.deepcopy(training.model.state_dict())
    training.step()
    with pytest.raises(ShardEmbError, match=r"table 't' is of commit 1 \(step 1\).*store\.rollback\(\)"):
        training.model.load_state_dict(state)
    store.rollback()
    training.model.load_state_dict(state)
    training.step()
    store.commit(step=2)
    with pytest.raises(ShardEmbError, match=r"is of commit 1 .*the last one is 2 \(step 2\).*only its last"):
        training.model.load_state_dict(state)

    store.create_table("u", num_embeddings=ROWS, embedding_dim=DIM)
    store.commit()
    with pytest.raises(ShardEmbError, match=r"is of table 't': make the module with store\['t'\]"):
        shardemb.torch.Embedding(store["u"]).load_state_dict(training.model[0].state_dict())
    store.copy(tmp_path / "copy.zarr")
    with shardemb.open(tmp_path / "copy.zarr") as other:
        module = shardemb.torch.Embedding(other["t"])
        with pytest.raises(ShardEmbError, match="this one is another, at .*copy.zarr.*strict=False"):
            module.load_state_dict(training.model[0].state_dict())
        module.load_state_dict({}, strict=False)
        with pytest.raises(TypeError, match="a reference to its rows"):
            module.load_state_dict({"_extra_state": [3]})


def test_a_state_with_changes_that_no_commit_has_says_so(training, store):
    with pytest.warns(RuntimeWarning, match=r"has changes since.*store\.commit\(\)"):
        state = training.model.state_dict()
    assert state["0._extra_state"][0]["changed_since"]
    store.commit()
    with pytest.raises(ShardEmbError, match=r"not committed.*call store\.commit\(\) before state_dict"):
        training.model.load_state_dict(state)


def test_torch_s_distributed_checkpoints_have_the_reference(training, store, tmp_path):
    class App:
        def state_dict(self):
            return {"model": training.model.state_dict(), "rows": training.rows.state_dict()}

        def load_state_dict(self, state):
            training.model.load_state_dict(state["model"])
            training.rows.load_state_dict(state["rows"])

    training.step()
    store.commit(step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs in one process
        dcp.save({"app": App()}, checkpoint_id=tmp_path / "dcp")
        weight = training.model[2].weight.detach().clone()
        lr = training.rows.param_groups[0]["lr"]
        training.step()
        store.rollback()
        dcp.load({"app": App()}, checkpoint_id=tmp_path / "dcp")
        torch.testing.assert_close(training.model[2].weight, weight)
        assert training.rows.param_groups[0]["lr"] == lr
        training.step()
        store.commit(step=2)
        with pytest.raises(Exception, match="only its last commit"):
            dcp.load({"app": App()}, checkpoint_id=tmp_path / "dcp")


# ---- checkpoints --------------------------------------------------------------------------------------------------


def test_training_goes_on_with_the_same_bits(training, store, tmp_path):
    folder = tmp_path / "below" / "rest"
    for _ in range(3):
        training.step()
    commit = training.save(folder, 3, metadata={"mine": 1})
    assert (commit.step, commit.metadata["mine"]) == (3, 1)
    assert os.listdir(folder) == [commit.metadata["shardemb.torch"]["file"]]
    expected = [training.step() for _ in range(4)]
    store.rollback()
    seed()
    again = Training(store)
    assert again.load(folder) == commit
    assert [again.step() for _ in range(4)] == expected
    again.save(folder, 7)
    assert len(os.listdir(folder)) == 1
    store.copy(tmp_path / "copy.zarr")
    with shardemb.open(tmp_path / "copy.zarr") as copied:
        assert Training(copied).load(folder).step == 7


def test_random_generators_may_be_left_alone(training, tmp_path):
    training.save(tmp_path / "rest", 1)
    before = torch.get_rng_state()
    torch.rand(1)
    training.load(tmp_path / "rest", random_state=False)
    assert not torch.equal(torch.get_rng_state(), before)
    training.load(tmp_path / "rest")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_rows_and_one_optimizer(store, tmp_path):
    linear = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    shardemb.torch.save(tmp_path / "rest", linear, optimizer, store)
    weight = linear.weight.detach().clone()
    torch.nn.init.zeros_(linear.weight)
    shardemb.torch.load(tmp_path / "rest", linear, optimizer, store)
    assert torch.equal(linear.weight, weight)


def test_what_does_not_go_with_the_last_commit_is_refused(training, store, tmp_path):
    folder = tmp_path / "rest"
    with pytest.raises(ShardEmbError, match="has no commit"):
        training.load(folder)
    commit = training.save(folder, 1)
    file = folder / commit.metadata["shardemb.torch"]["file"]
    training.step()
    with pytest.raises(ShardEmbError, match=r"changed since its last commit, 1 .*store\.rollback\(\)"):
        training.load(folder)
    store.rollback()
    for others in ({}, {**training.parts["others"], "more": training.generator}):
        with pytest.raises(ShardEmbError, match="pass them all"):
            shardemb.torch.load(folder, training.model, [training.dense, training.rows], store, others=others)
    with pytest.raises(ShardEmbError, match="2 optimizers were saved, and 1 were given"):
        shardemb.torch.load(folder, training.model, training.rows, store, **training.parts)
    with pytest.raises(FileNotFoundError, match="pass the folder that"):
        training.load(tmp_path)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    for content in (damaged, damaged[:-1]):
        file.write_bytes(content)
        with pytest.raises(FormatError, match="is damaged"):
            training.load(folder)
    store.commit(step=2)
    with pytest.raises(ShardEmbError, match=r"commit 2 \(step 2\).*was not made by shardemb\.torch\.save"):
        training.load(folder)


def test_what_cannot_be_saved_is_refused_before_anything_is(training, store, tmp_path):
    folder = tmp_path / "rest"
    with pytest.raises(TypeError, match=r"others\['x'\] has no state.*metadata"):
        shardemb.torch.save(folder, training.model, training.rows, store, others={"x": 3})
    with pytest.raises(ValueError, match="local disk"):
        shardemb.torch.save("s3://bucket/rest", training.model, training.rows, store)
    with (
        shardemb.open(tmp_path / "other.zarr") as other,
        pytest.raises(ValueError, match="is in another store"),
    ):
        shardemb.torch.save(folder, training.model, training.rows, other)
    with pytest.raises(TypeError, match="step"):
        training.save(folder, "x")
    assert store.last_commit is None
    training.save(folder, 1)  # removes what the attempt left
    assert len(os.listdir(folder)) == 1


def test_a_file_of_a_checkpoint_is_no_state_by_itself(training, store, tmp_path):
    commit = training.save(tmp_path / "rest", 1)
    document = torch.load(tmp_path / "rest" / commit.metadata["shardemb.torch"]["file"], weights_only=True)
    with pytest.raises(ShardEmbError, match=r"load it with shardemb\.torch\.load"):
        training.model.load_state_dict(document["model"])


# ---- processes that die -------------------------------------------------------------------------------------------


def in_fork(work):
    """Do something in a fork of this process; return its pid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of its parent's threads
            work()
        finally:
            os._exit(0)
    return pid


def train(path, last_step, log=None, every=2):
    """Train from the last checkpoint to a step; return the losses, which are also written to a file."""
    store = shardemb.open(path / "s.zarr", threads=1)
    seed()
    training = Training(store)
    done = training.load(path / "rest").step if store.last_commit else 0
    losses = {}
    for step in range(done + 1, last_step + 1):
        losses[step] = training.step()
        if log is not None:
            with log.open("a") as file:
                file.write(f"{step} {losses[step].hex()}\n")
        if step % every == 0:
            training.save(path / "rest", step)
    close_quietly(store)
    return losses


@pytest.mark.timeout(120)
def test_training_that_is_killed_has_the_losses_of_one_that_was_not(tmp_path):
    (tmp_path / "straight").mkdir()
    expected = train(tmp_path / "straight", 40)
    path, log, chance, killed = tmp_path / "killed", tmp_path / "log", random.Random(1), 0
    path.mkdir()
    for _ in range(KILLS):
        pid = in_fork(lambda: train(path, 40, log))
        time.sleep(chance.uniform(0.02, 0.3))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert killed > 0
    train(path, 40, log)
    found = [line.split() for line in log.read_text().splitlines() if line.count(" ") == 1]
    assert {int(step) for step, _ in found} == set(range(1, 41))
    for step, loss in found:
        assert float.fromhex(loss) == expected[int(step)]


CHANGES = [
    "make_directory",
    "sync_directory",
    "stage",
    "publish",
    "write",
    "sync",
    "sync_data",
    "remove",
    "rename",
]


@pytest.mark.parametrize("when", ["before", "after"])
def test_whatever_a_save_dies_at_the_checkpoint_is_whole(tmp_path, when):
    with shardemb.open(tmp_path / "s.zarr", threads=1) as store:
        seed()
        training = Training(store)
        training.step()
        training.save(tmp_path / "rest", 1)
        weights = {1: training.model[2].weight.detach().clone()}
    with shardemb.open(tmp_path / "s.zarr", threads=1) as store:
        training = Training(store)
        training.load(tmp_path / "rest")
        training.step()
        weights[2] = training.model[2].weight.detach().clone()
        close_quietly(store)

    def save(dies_at):
        store = shardemb.open(tmp_path / "s.zarr", threads=1)
        training = Training(store)
        if training.load(tmp_path / "rest").step == 2:
            os._exit(2)
        training.step()
        calls = 0

        def dying(original):
            def call(*given, **options):
                nonlocal calls
                calls += 1
                dies = calls == dies_at
                if dies and when == "before":
                    os._exit(1)
                result = original(*given, **options)
                if dies:
                    os._exit(1)
                return result

            return call

        for name in CHANGES:
            setattr(files, name, dying(getattr(files, name)))
        training.save(tmp_path / "rest", 2)
        os._exit(0)

    found = []
    for dies_at in range(1, 40):
        pid = in_fork(lambda: save(dies_at))  # noqa: B023 it runs at once
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with shardemb.open(tmp_path / "s.zarr", threads=1) as store:
            training = Training(store)
            step = training.load(tmp_path / "rest").step
            assert torch.equal(training.model[2].weight, weights[step])
            found.append(step)
            if step == 2:
                break
        assert code == 1
    assert found == [1] * found.index(2) + [2]
    assert len(found) > 5
