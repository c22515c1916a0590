"""Exports of a sample for TensorBoard's projector and for its stand-alone page."""

import json
import re

import numpy as np
import pytest
from support.exports import DIM, keyed_table, nothing_left, plain_table, same_bits

import shardemb
from shardemb import exports
from shardemb.exports import selection
from shardemb.storage import files


def read(folder):
    """Return labels and vectors, after a check that all files of the folder say the same."""
    text = (folder / "tensors.tsv").read_text().split("\n")[:-1]
    vectors = np.array([[np.float32(each) for each in line.split("\t")] for line in text], np.float32)
    page = json.loads((folder / "projector_config.json").read_text())["embeddings"][0]
    assert page["tensorShape"] == list(vectors.shape)
    assert same_bits(np.fromfile(folder / page["tensorPath"], "<f4").reshape(vectors.shape), vectors)
    config = (folder / "projector_config.pbtxt").read_text()
    fields = dict(re.findall(r'^  (\w+): "(.*)"$', config, re.M))
    assert fields == {
        "tensor_name": page["tensorName"],
        "tensor_path": "tensors.tsv",
        "metadata_path": page["metadataPath"],
    }
    assert re.fullmatch(r"embeddings \{\n.*\}\n", config, re.S)
    labels = (folder / "metadata.tsv").read_bytes().decode().split("\n")
    assert labels.pop() == ""
    assert len(labels) == len(vectors)
    return labels, vectors


def test_a_random_sample_is_that_of_its_seed(store, tmp_path):
    table, rows = plain_table(store)
    samples = []
    for seed in (0, 0, 1):
        report = table.export(tmp_path / "p", exports.Projector(sample=50, seed=seed))
        assert report.num_rows == 50
        assert report.nbytes == sum(path.stat().st_size for path in (tmp_path / "p").iterdir())
        labels, vectors = read(tmp_path / "p")
        ids = [int(label) for label in labels]
        assert ids == sorted(set(ids))
        assert same_bits(vectors, rows[ids])
        samples.append(ids)
    assert samples[0] == samples[1] != samples[2]
    assert max(samples[0]) > 1000


def test_a_sample_of_few_rows_is_all_of_them(store, tmp_path):
    table, keys, rows = keyed_table(store)
    table.export(tmp_path / "p", "projector")
    labels, vectors = read(tmp_path / "p")
    assert labels == keys
    assert same_bits(vectors, rows)


def test_the_rows_that_were_updated_most_often(store, tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "SCANNED_ROWS", 100)
    table, _ = plain_table(store, optimizer=shardemb.optim.SGD(lr=0.0), counters=True)
    for ids in ([900, 3], [3, 1200], [900, 3, 40]):
        table.update(ids, np.zeros((len(ids), DIM), np.float32))
    for number, expected in ((1, [3]), (2, [3, 900]), (3, [3, 40, 900]), (5, [0, 3, 40, 900, 1200])):
        table.export(tmp_path / "p", exports.Projector(sample=number, by="count"))
        assert read(tmp_path / "p")[0] == [str(row) for row in expected]
    table.export(tmp_path / "p", exports.Projector(sample=1, by="count"), rows=(4, 1000))
    assert read(tmp_path / "p")[0] == ["900"]


def test_given_keys_are_shown(store, tmp_path):
    table, _, _ = keyed_table(store)
    table.export(tmp_path / "p", exports.Projector(sample=["Z", "of"]))
    assert read(tmp_path / "p")[0] == ["of", "Z"]


def test_what_would_end_a_label_becomes_a_blank(store, tmp_path):
    table, _, _ = keyed_table(store, ["a\tb", "c\nd", "e f", "日本\r"], ())
    table.export(tmp_path / "p", "projector")
    assert read(tmp_path / "p")[0] == ["a b", "c d", "e f", "日本 "]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 0}, "sample"),
        (
            {"sample": 5, "by": "count"},
            "has no counters, so it does not know which rows are the most frequent",
        ),
        ({"sample": 5, "by": "size"}, '"random" or "count"'),
    ],
)
def test_what_cannot_be_sampled_is_refused(store, tmp_path, options, message):
    table, _ = plain_table(store, 10)
    with pytest.raises(ValueError, match=message):
        table.export(tmp_path / "p", exports.Projector(**options))
    assert nothing_left(tmp_path)


def test_a_failure_leaves_the_folder_of_before(store, tmp_path, monkeypatch):
    table, _ = plain_table(store, 10)
    table.export(tmp_path / "p", exports.Projector(sample=3))
    before = read(tmp_path / "p")
    monkeypatch.setattr(files, "sync", lambda *arguments: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(OSError, match="broken"):
        table.export(tmp_path / "p", exports.Projector(sample=4))
    after = read(tmp_path / "p")
    assert before[0] == after[0]
    assert nothing_left(tmp_path, "p")


def test_a_folder_with_something_else_is_refused(store, tmp_path):
    table, _ = plain_table(store, 10)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="choose another name"):
        table.export(tmp_path / "p", "projector")
