"""The quickstart: its text, its batches, its mathematics, and runs that stop and continue."""

from __future__ import annotations

import dataclasses
import functools
import io
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import shardemb
from shardemb.quickstart import corpus, training
from shardemb.quickstart.training import OptionError, Options, gradients, nearest, run

build = functools.cache(corpus.build)


@pytest.fixture(scope="module")
def text():
    return build(300)


def encoded_by_hand(text):
    """Turn a text into row ids from 2 on, with a dict."""
    row_of = {word: row for row, word in enumerate(text.words, 2)}
    rows = [[row_of[word] for word in passage.split() if word in row_of] for passage in text.passages]
    return corpus.Encoded(
        np.fromiter((row for each in rows for row in each), np.int64),
        np.repeat(np.arange(len(rows)), [len(each) for each in rows]),
    )


@pytest.fixture(scope="module")
def encoded(text):
    return encoded_by_hand(text)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Options of a run that takes a second, over a text that is read once for all tests."""
    monkeypatch.setattr(corpus, "build", build)
    return Options(tmp_path / "run", vocabulary=300, dim=16, steps=20, commit_every=5)


def quiet():
    return Console(quiet=True)


def contents(options):
    """Every row of both tables, with its optimizer state."""
    with shardemb.open(options.store, mode="r") as store:
        tables = [store[name].rows for name in ("words", "contexts")]
        rows = np.arange(store["words"].num_embeddings)
        return [a for table in tables for a in (table.lookup(rows), table.state("sum", rows))]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- the text


def test_the_text_is_large_and_the_same_each_time(text, encoded):
    assert len(text.words) == len(set(text.words)) == 300
    assert {"the", "list", "string", "file", "class"} <= set(text.words)
    assert len(encoded.rows) > 100_000
    assert set(encoded.rows) == set(range(2, 302))
    assert (np.diff(encoded.counts[2:]) <= 0).all()
    again = corpus.build(300)
    assert again.fingerprint == text.fingerprint
    assert again == text


def test_the_fingerprint_tells_texts_apart(text):
    assert dataclasses.replace(text, passages=text.passages[::-1]).fingerprint != text.fingerprint
    assert dataclasses.replace(text, passages=(*text.passages, "more")).fingerprint != text.fingerprint
    assert dataclasses.replace(text, words=text.words[::-1]).fingerprint != text.fingerprint


def test_the_encoder_finds_the_rows_that_a_dict_does(store, text, encoded):
    words = store.create_vocabulary("words", key_type="string", reserved=2)
    words.add(text.words)
    found = training.encode(text.passages, words)
    np.testing.assert_array_equal(found.rows, encoded.rows)
    np.testing.assert_array_equal(found.passage, encoded.passage)
    words.add([word for passage in text.passages for word in passage.split()])  # none left out
    assert len(training.encode(text.passages, words).rows) == sum(len(p.split()) for p in text.passages)


@pytest.mark.parametrize(
    ("source", "paragraphs"),
    [
        ("Return the List.", [["return", "the", "list"]]),
        ("It's built-in, isn't it?", [["it's", "built-in", "isn't", "it"]]),
        (
            "One two\nthree four.\n\nFive six seven",
            [["one", "two", "three", "four"], ["five", "six", "seven"]],
        ),
        ("a b c\n   \t\nd e f", [["a", "b", "c"], ["d", "e", "f"]]),
        (">>> print the list now\n... or some other list", []),
        ("----------------\n================", []),
        ("for x in range(10): total += x[1] * y[2]", []),
        ("too short", []),
        ("", []),
    ],
)
def test_prose_keeps_english_and_leaves_out_code(source, paragraphs):
    assert list(corpus.prose(source)) == paragraphs


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library with everything that can be wrong with one; no language reference."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    folder = tmp_path / "lib"
    files = {
        "a.py": b'"""Module text number one."""\ndef f():\n    """Function text number two."""\n',
        "b.py": b"# comment text number three,\n# and its second line\nx = 1  # code remark left out\n",
        "bad_syntax.py": b'"""Broken syntax text here."""\ndef f(:\n',
        "bad_bytes.py": b'"""Broken bytes text here \xff."""\n',
        "latin.py": b'# -*- coding: latin-1 -*-\n"""Latin text number four \xe9."""\n',
        "unknown.py": b'# -*- coding: no-such-codec -*-\n"""Unknown codec text here."""\n',
        "null.py": b'"""Null byte text here."""\0',
        "package/c.py": b'class C:\n    """Class text number five."""\n    if True:\n        def f(self):\n'
        b'            """Method text number six."""\n',
        "package/d.py": b'"""Module text number one."""\n"Not a docstring text here."\n',
        "test/test_a.py": b'"""Test folder text here."""\n',
        "site-packages/other.py": b'"""Somebody else\'s text here."""\n',
        "notes.txt": b"Not a source text here.\n",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "gone.py").symlink_to(folder / "nowhere.py")
    return folder


def test_a_damaged_library_gives_what_can_be_read_of_it(library):
    built = corpus.build(100, library)
    assert built.passages == (
        "module text number one",
        "function text number two",
        "comment text number three and its second line",
        "latin text number four",
        "class text number five",
        "method text number six",
    )
    assert built.words[:2] == ("number", "text")  # equally frequent, so in alphabetical order


def test_a_small_vocabulary_keeps_the_frequent_words(library):
    built = corpus.build(2, library)
    assert built.words == ("number", "text")
    assert list(encoded_by_hand(built).counts[2:]) == [6, 6]


def test_a_library_without_sources_is_an_error(tmp_path, library):
    with pytest.raises(FileNotFoundError, match="no source files"):
        corpus.build(100, tmp_path / "nothing here")


# ---- batches


def same_batch(left, right):
    return all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in ("words", "contexts", "weights")
    )


def test_a_batch_is_a_function_of_seed_and_step(encoded):
    batches = corpus.Batches(encoded, seed=3)
    assert batches.per_epoch > 1
    steps = [0, 1, batches.per_epoch - 1, batches.per_epoch, 3 * batches.per_epoch + 1]
    made = {step: batches[step] for step in steps}
    for step in reversed(steps):
        assert same_batch(corpus.Batches(encoded, seed=3)[step], made[step])
        assert same_batch(batches[step], made[step])
    assert not same_batch(made[0], made[1])
    assert not same_batch(made[0], made[batches.per_epoch])
    assert not same_batch(made[0], corpus.Batches(encoded, seed=4)[0])


def test_a_batch_has_tens_of_thousands_of_pairs_in_reach_of_each_other(encoded):
    batch = corpus.Batches(encoded, seed=0)[5]
    length = corpus.SPAN_LENGTH
    assert batch.words.shape == (corpus.SPANS, length)
    assert batch.contexts.shape == (corpus.SPANS, length + corpus.NOISE)
    np.testing.assert_array_equal(batch.contexts[:, :length], batch.words)
    assert batch.contexts.min() >= 2
    assert batch.contexts.max() < len(encoded.counts)
    near, noise = batch.weights[:, :, :length], batch.weights[:, :, length:]
    _, row, column = np.nonzero(near)
    assert batch.pairs == len(row) == near.sum() > 10_000
    assert set(np.abs(row - column)) == set(range(1, corpus.WINDOW + 1))
    expected = near.sum(axis=2) * corpus.NOISE_PER_PAIR
    np.testing.assert_allclose(noise.sum(axis=2), expected, rtol=1e-5)


def test_an_epoch_uses_nearly_every_rare_word_and_few_of_the_frequent(encoded):
    batches = corpus.Batches(encoded, seed=0)
    used = sum(np.bincount(batches[step].words.ravel(), minlength=302) for step in range(batches.per_epoch))
    share = used[2:] / encoded.counts[2:]
    assert share[0] < 0.3  # "the"
    assert share[-50:].mean() > 0.6
    assert share.max() <= 1.2


def test_words_of_two_passages_are_not_neighbours(encoded):
    alone = dataclasses.replace(encoded, passage=np.arange(len(encoded.rows)))
    assert corpus.Batches(alone, seed=0)[0].pairs == 0


# ---- the mathematics


def test_gradients_are_the_slopes_of_the_loss():
    random = np.random.default_rng(0)
    words, contexts = random.normal(size=(2, 3, 4)), random.normal(size=(2, 5, 4))
    weights = random.uniform(0, 2, size=(2, 3, 5))
    _, *exact = gradients(words, contexts, weights)
    step = 1e-6
    for array, slopes in zip((words, contexts), exact, strict=True):
        assert slopes.shape == array.shape
        for place in np.ndindex(array.shape):
            kept = array[place]
            array[place] = kept + step
            above = gradients(words, contexts, weights)[0]
            array[place] = kept - step
            below = gradients(words, contexts, weights)[0]
            array[place] = kept
            assert slopes[place] == pytest.approx((above - below) / (2 * step), abs=1e-7)


def test_the_loss_is_that_of_the_formula():
    words, contexts = np.array([[[0.5, 1.0]]]), np.array([[[1.0, -2.0], [3.0, 0.5]]])
    weights = np.array([[[2.0, 3.0]]])
    expected = 2 * np.log1p(np.exp(1.5)) + 3 * np.log1p(np.exp(2.0))
    assert gradients(words, contexts, weights)[0] == pytest.approx(expected, rel=1e-12)


def test_gradients_of_huge_scores_are_finite_and_float32():
    words = np.full((1, 2, 2), 1e3, np.float32)
    contexts = np.array([[[1e3, 1e3], [-1e3, -1e3], [1e3, 1e3]]], np.float32)
    loss, *slopes = gradients(words, contexts, np.ones((1, 2, 3), np.float32))
    assert np.isfinite(loss)
    assert all(slope.dtype == np.float32 and np.isfinite(slope).all() for slope in slopes)


def test_nearest_goes_by_the_angle():
    vectors = np.array([[1, 0], [0, 5], [9, 1], [-1, 0], [0, 0], [2, 2]], np.float32)
    assert nearest("a", "abcdef", vectors, count=3) == ("c", "f", "b")
    assert nearest("a", "abcdef", vectors) == ("c", "f", "b", "e", "d")


# ---- runs


def test_a_run_leaves_a_store_and_one_parquet_file(small):
    console = Console(file=io.StringIO(), width=80)
    result = run(small, console)
    assert (result.steps, result.trained) == (20, 20)
    assert sorted(path.name for path in small.folder.iterdir()) == ["store.zarr", "words.parquet"]
    assert small.parquet.is_file()
    with shardemb.open(small.store, mode="r") as store:
        assert sorted(store) == ["contexts", "words"]
        assert store.last_commit.step == 20
        assert store.last_commit.metadata["seed"] == 0
        assert store.last_commit.metadata["loss"] == result.loss
        words = list(store.vocabularies["words"])
        vectors = store["words"].lookup(words)
        assert store["contexts"].vocabulary is store.vocabularies["words"]
    assert words == list(build(300).words)  # the more frequent one first
    exported = pq.read_table(result.parquet)
    np.testing.assert_array_equal(exported["id"].to_numpy(), np.arange(2, 302))
    assert exported["key"].to_pylist() == words
    np.testing.assert_array_equal(np.stack(exported["embedding"].to_numpy()), vectors)
    assert result.neighbours["list"] == nearest("list", words, vectors)
    assert 0 < result.bytes_on_disk < 10 * vectors.nbytes + 2**20

    lines = console.file.getvalue().split("\n")
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split("loss")[0].split() for line in steps] == [
        ["step", str(step), "of", "20"] for step in (5, 10, 15, 20)
    ]
    losses = [float(line.split("loss")[1].split()[0]) for line in steps]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] + 0.2
    assert all("rows/s" in line and "written" in line for line in steps)
    assert any(line.split()[:1] == ["list"] for line in lines)
    assert "\x1b" not in console.file.getvalue()


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small, tmp_path):
    first = run(small, quiet())
    twin = dataclasses.replace(small, folder=tmp_path / "twin")
    assert run(twin, quiet()).loss == first.loss
    assert_same(contents(small), contents(twin))
    # Where commits fall has no influence on what is trained.
    rare = dataclasses.replace(small, folder=tmp_path / "rare", commit_every=7)
    run(rare, quiet())
    assert_same(contents(small), contents(rare))
    other = dataclasses.replace(small, folder=tmp_path / "other", seed=1)
    run(other, quiet())
    assert not np.array_equal(contents(small)[0], contents(other)[0])


def test_a_second_run_continues_and_a_third_has_nothing_to_do(small, tmp_path):
    short = dataclasses.replace(small, steps=8)
    assert run(short, quiet()).trained == 8
    console = Console(file=io.StringIO(), width=80)
    result = run(small, console)
    assert (result.steps, result.trained) == (20, 12)
    assert "Continuing from step 8" in console.file.getvalue()
    whole = dataclasses.replace(small, folder=tmp_path / "whole")
    run(whole, quiet())
    assert_same(contents(small), contents(whole))

    before = contents(small)
    small.parquet.unlink()
    console = Console(file=io.StringIO(), width=80)
    again = run(small, console)
    assert "trained already: 20 steps" in console.file.getvalue()
    assert (again.steps, again.trained, again.loss) == (20, 0, result.loss)
    assert again.neighbours == result.neighbours
    assert again.parquet.is_file()
    assert_same(contents(small), before)
    assert run(short, quiet()).steps == 20  # fewer steps than there are: nothing is undone


@pytest.mark.parametrize(("stopped_after", "saved"), [(13, 10), (3, 0)])
def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    small, tmp_path, monkeypatch, stopped_after, saved
):
    step, calls = training._step, iter(range(1000))

    def interrupted(store, batch):
        if next(calls) == stopped_after:
            raise KeyboardInterrupt
        return step(store, batch)

    console = Console(file=io.StringIO(), width=80)
    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run(small, console)
    assert stopped.value.code == 130
    assert f"Step {saved} is saved" in console.file.getvalue()
    with shardemb.open(small.store, mode="r") as store:
        assert store.last_commit.step == saved
        assert store.verify() == []
    assert run(small, quiet()).trained == 20 - saved
    whole = dataclasses.replace(small, folder=tmp_path / "whole")
    run(whole, quiet())
    assert_same(contents(small), contents(whole))


def test_an_interrupt_before_the_first_commit_leaves_nothing_in_the_way(small, monkeypatch):
    def interrupted(vocabulary):
        raise KeyboardInterrupt

    console = Console(file=io.StringIO(), width=80)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "build", interrupted)
        with pytest.raises(SystemExit):
            run(small, console)
    assert "Nothing was saved" in console.file.getvalue()
    assert run(small, quiet()).steps == 20


@pytest.mark.parametrize("change", [{"dim": 8}, {"vocabulary": 200}, {"seed": 7}])
def test_options_that_disagree_with_the_folder_are_refused(small, change):
    run(dataclasses.replace(small, steps=2), quiet())
    before = contents(small)
    (name, value), *_ = change.items()
    message = rf"{name} is {value}, but .* was trained with {getattr(small, name)}.*another folder.*delete"
    with pytest.raises(OptionError, match=message):
        run(dataclasses.replace(small, **change), quiet())
    assert_same(contents(small), before)


def test_another_text_is_refused(small, text, monkeypatch):
    run(dataclasses.replace(small, steps=2), quiet())
    other = dataclasses.replace(text, passages=text.passages[:-1])
    monkeypatch.setattr(corpus, "build", lambda vocabulary: other)
    with pytest.raises(OptionError, match="another Python's text"):
        run(small, quiet())


@pytest.mark.parametrize("name", ["vocabulary", "dim", "steps", "seed", "commit_every"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(OptionError, match=f"{name} must be at least"):
        Options(**{name: -1})


def test_option_errors_are_what_callers_expect():
    assert issubclass(OptionError, shardemb.ShardEmbError)
    assert issubclass(OptionError, ValueError)


def test_a_terminal_gets_a_live_bar(small, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    run(small, console)
    assert "20 of 20 steps" in sys.stderr.getvalue()
    assert "\x1b[" in sys.stderr.getvalue()
    assert "rows/s" in console.file.getvalue()


# ---- slow: what a user sees

EXPECTED = {
    "list": {"lists", "tuple", "tuples", "dict", "dictionary", "sequence"},
    "string": {"strings", "format", "representation", "characters", "text", "ascii"},
    "bytes": {"byte", "bytes-like", "bytearray", "str", "buffer", "decode"},
    "integer": {"integers", "int", "float", "number", "positive"},
    "true": {"false", "boolean", "flag"},
    "exception": {"raised", "raise", "raises", "error", "exceptions"},
    "class": {"classes", "instance", "subclass", "base", "derived", "method"},
    "function": {"functions", "method", "callable", "coroutine"},
    "module": {"modules", "import", "imported", "package"},
    "file": {"files", "filename", "directory", "opened", "open"},
    "thread": {"threads", "lock", "process"},
    "server": {"client", "connection", "request", "response"},
}


@pytest.mark.slow
def test_the_default_training_finds_sensible_neighbours(tmp_path):
    result = run(Options(tmp_path / "quickstart"), quiet())
    missed = {
        word: result.neighbours[word]
        for word, expected in EXPECTED.items()
        if len(expected.intersection(result.neighbours[word])) < 1
    }
    assert missed == {}
    found = [len(expected.intersection(result.neighbours[word])) for word, expected in EXPECTED.items()]
    assert sum(found) >= 30  # of the eight shown for each of twelve words; 45 are usual
    assert set(EXPECTED) == set(training.SHOWN)


@pytest.mark.slow
def test_ctrl_c_on_a_real_process_leaves_the_last_commit(tmp_path):
    program = (
        "import pathlib; from shardemb.quickstart.training import Options, run; "
        f"run(Options(pathlib.Path({str(tmp_path)!r}), vocabulary=300, dim=16, steps=100_000, commit_every=5))"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1].replace(",", "")) >= 20:
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == ""
    saved = int(rest.split("Step ")[-1].split(" is saved")[0].replace(",", ""))
    assert saved >= 20
    with shardemb.open(tmp_path / "store.zarr", mode="r") as store:
        assert store.last_commit.step == saved


@pytest.mark.soak
@pytest.mark.parametrize("committed", [0, 10])
def test_a_killed_process_continues_as_if_nothing_had_happened(small, tmp_path, committed):
    options = dataclasses.replace(small, folder=tmp_path / "killed")
    program = (
        "import pathlib; from shardemb.quickstart import training as quickstart; "
        f"quickstart.run(quickstart.Options(pathlib.Path({str(options.folder)!r}), vocabulary=300, dim=16, "
        "steps=100_000, commit_every=5))"
    )
    with subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("Text" if committed == 0 else f"step {committed:>7}"):
                break
        process.kill()
    with shardemb.open(options.store, mode="r") as store:
        saved = store.last_commit.step
        assert saved >= committed
        assert store.verify() == []
    steps = saved + 10
    assert run(dataclasses.replace(options, steps=steps), quiet()).trained == 10
    whole = dataclasses.replace(small, folder=tmp_path / "whole", steps=steps)
    run(whole, quiet())
    assert_same(contents(options), contents(whole))
