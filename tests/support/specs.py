"""Specs of tables."""

from dataclasses import replace

from shardemb.format.spec import FLOAT32, TableSpec, choose_rows_per_shard
from shardemb.initializers import Constant

UUID = "0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c11"


def make(
    num_embeddings=1000, dim=6, optimizer=None, initializer=None, rows_per_shard=None, precision=FLOAT32
):
    spec = TableSpec(
        uuid=UUID,
        stream="tokens",
        num_embeddings=num_embeddings,
        embedding_dim=dim,
        rows_per_shard=1,
        optimizer=optimizer,
        initializer=initializer or Constant(0.0),
        precision=precision,
    )
    rows = choose_rows_per_shard(num_embeddings, spec.record_bytes, rows_per_shard, 1000)
    return replace(spec, rows_per_shard=rows)
