"""Specs of tables."""

from shardemb.format import spec
from shardemb.format.spec import TableSpec, choose_rows_per_shard
from shardemb.initializers import Constant

UUID = "0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c11"


def make(num_embeddings=1000, dim=6, optimizer=None, initializer=None, rows_per_shard=None):
    width = spec.record_columns(dim, optimizer).popitem()[1][1]
    return TableSpec(
        uuid=UUID,
        stream="tokens",
        num_embeddings=num_embeddings,
        embedding_dim=dim,
        rows_per_shard=choose_rows_per_shard(num_embeddings, 4 * width, rows_per_shard, 1000),
        optimizer=optimizer,
        initializer=initializer or Constant(0.0),
    )
