"""The order in which a fold writes: a row whose presence bit is set has its record."""

import numpy as np
import pytest

import shardemb
from shardemb.initializers import Uniform
from shardemb.storage import files, fold


@pytest.mark.parametrize("threads", [1, 4])
def test_presence_bits_are_written_after_all_records_are_durable(path, threads, monkeypatch):
    """Of all tables: a lookup without the lock, and a fold that was interrupted, may see any part of this."""
    calls, writing = [], []

    def spy(name):
        real = getattr(files, name)

        def record(*arguments):
            if writing:
                calls.append((name, str(arguments[-1])))
            return real(*arguments)

        monkeypatch.setattr(files, name, record)

    def write(*arguments):
        writing.append(1)
        real_write(*arguments)
        writing.clear()

    with shardemb.open(path, threads=threads) as store:
        for name in ("a", "b"):
            store.create_table(
                name, num_embeddings=1000, embedding_dim=16, rows_per_shard=128, initializer=Uniform(-1, 1)
            )
        store.commit()
        for table in store.values():
            table.write(range(0, 1000, 3), np.ones((334, 16)))
        store.commit()
        spy("write")
        spy("sync_data")
        real_write = fold.write
        monkeypatch.setattr(fold, "write", write)
        store.checkpoint()
    synced = [i for i, (name, file) in enumerate(calls) if name == "sync_data" and "/rows/" in file]
    bits = [i for i, (name, file) in enumerate(calls) if name == "write" and "/present/" in file]
    assert len(synced) == 16
    assert len(bits) == 2
    assert max(synced) < min(bits)
