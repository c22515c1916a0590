"""The examples with which Keras and Lasagne define an embedding layer, on a table.

Keras: ``keras/src/layers/core/embedding.py`` and its test. Lasagne: ``lasagne/layers/embedding.py`` and its test.
"""

import numpy as np
import pytest

import shardemb
from shardemb.optim import SGD

W = np.arange(3 * 5).reshape(3, 5)


@pytest.fixture
def table(store):
    """Lasagne's example: a vocabulary of three, vectors of five, weights 0 to 14."""
    table = store.create_table(
        "embedding", num_embeddings=3, embedding_dim=5, initializer=W, optimizer=SGD(lr=1.0)
    )
    store.commit()
    return table


def test_lasagne_ids_pick_rows(table):
    output = table.lookup([[0, 2], [1, 2]])
    assert output.shape == (2, 2, 5)
    assert output.dtype == np.float32
    assert (output == [[W[0], W[2]], [W[1], W[2]]]).all()
    assert (output.reshape(4, 5) == W[[0, 2, 1, 2]]).all()


def test_keras_an_id_beyond_the_vocabulary_raises(table):
    with pytest.raises(IndexError, match=r"row id 5 at position \(0, 0\)"):
        table.lookup([[5, 0], [1, 2]])


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_keras_each_id_becomes_a_vector_in_its_place(store, dim):
    table = store.create_table("keras", num_embeddings=1000, embedding_dim=dim)
    assert table.lookup([[4], [20]]).shape == (2, 1, dim)
    assert table.lookup(np.zeros((32, 10), int)).shape == (32, 10, dim)
    assert table.lookup(7).shape == (dim,)


def test_the_lookup_is_the_one_hot_matrix_times_the_weights(table):
    ids = np.array([[0, 2], [1, 2]])
    one_hot = np.eye(3, dtype=np.float32)[ids]
    assert (table.lookup(ids) == one_hot @ W.astype(np.float32)).all()


def test_the_gradient_of_a_lookup_is_the_one_hot_matrix_transposed_times_the_gradient(table):
    ids = np.array([[0, 2], [1, 2]])
    one_hot = np.eye(3, dtype=np.float32)[ids.reshape(-1)]
    gradient = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    table.update(ids, gradient)
    assert (table.lookup([0, 1, 2]) == W - one_hot.T @ gradient.reshape(4, 5)).all()


def test_the_examples_survive_reopening(table, store, path):
    store.close()
    with shardemb.open(path, "r") as again:
        assert (again["embedding"].lookup([[0, 2], [1, 2]]) == W[[[0, 2], [1, 2]]]).all()
