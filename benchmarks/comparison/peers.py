"""Engines that store rows on disk, each with its fastest batched call.

All have the same interface: data is created once from a table's values; `open`; `read(ids)` returns float32 rows;
`write(ids, rows)` is durable when it returns; `close`. In key-value engines, the key is the row's id in 8 bytes.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.common import DIM, ROW_BYTES

from .data import batches, remove

MODULES = {
    "torch": "torch",
    "FBGEMM": "fbgemm_gpu",
    "dask.distributed": "distributed",
    "zarr": "zarr",
    "tensorstore": "tensorstore",
    "lmdb": "lmdb",
    "RocksDB": "rocksdict",
    "Lance": "lance",
    "h5py": "h5py",
    "gensim": "gensim",
    "usearch": "usearch",
}
"""The module of each peer."""

ROWS_PER_CHUNK = 1024
"""Rows in a chunk of zarr, tensorstore and h5py: smaller ones make too many files, larger ones cost more per row."""

_SYNCERS = 16


def has(name):
    """Return whether a peer is installed."""
    return importlib.util.find_spec(MODULES[name]) is not None


def missing(names):
    """Return those of the named peers that are not installed."""
    return tuple(name for name in names if name in MODULES and not has(name))


class Peer:
    """Base class of the engines, which creates their data once."""

    name = ""

    def __init__(self, data):
        self.data = data
        self.path = data.made(f"peer-{self.name}", self.build)

    def build(self, path):
        """Write the table's values."""
        raise NotImplementedError

    def open(self):
        """Open it, without reading any of it into the process's memory."""
        raise NotImplementedError

    def close(self):
        """Close it."""

    def remove(self):
        """Close it and delete its data."""
        self.close()
        remove(self.path)


class Zarr(Peer):
    """zarr-python: `oindex`, uncompressed chunks of 256 KiB; a write syncs the chunks that it changed."""

    name = "zarr"

    def build(self, path):
        import zarr

        shape, chunks = (self.data.rows, DIM), (ROWS_PER_CHUNK, DIM)
        array = zarr.create_array(path, shape=shape, chunks=chunks, dtype="float32", compressors=None)
        for ids in batches(self.data.rows):
            array[ids[0] : ids[-1] + 1] = self.data.raw[ids[0] : ids[-1] + 1]

    def open(self):
        import zarr

        self.array = zarr.open_array(self.path, mode="r+")

    def read(self, ids):
        return self.array.oindex[ids]

    def write(self, ids, rows):
        self.array.oindex[ids] = rows
        changed = np.unique(ids // ROWS_PER_CHUNK)
        with ThreadPoolExecutor(_SYNCERS) as pool:
            list(pool.map(_sync, (self.path / f"c/{chunk}/0" for chunk in changed)))


class TensorStore(Zarr):
    """tensorstore on zarr v3; it syncs what it writes unless told not to."""

    name = "tensorstore"

    def open(self):
        import tensorstore

        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(self.path)}}
        self.array = tensorstore.open(spec, open=True).result()

    def read(self, ids):
        return self.array[ids].read().result()

    def write(self, ids, rows):
        self.array[ids] = rows


class H5py(Peer):
    """h5py: one chunked dataset; ids are made ascending and distinct, because it accepts no others."""

    name = "h5py"

    def build(self, path):
        import h5py

        with h5py.File(path, "w") as file:
            shape, chunks = (self.data.rows, DIM), (ROWS_PER_CHUNK, DIM)
            rows = file.create_dataset("rows", shape, np.float32, chunks=chunks)
            for ids in batches(self.data.rows):
                rows[ids[0] : ids[-1] + 1] = self.data.raw[ids[0] : ids[-1] + 1]

    def open(self):
        import h5py

        self.file = h5py.File(self.path, "r+")
        self.array = self.file["rows"]

    def close(self):
        self.file.close()

    def read(self, ids):
        unique, inverse = np.unique(ids, return_inverse=True)
        return self.array[unique][inverse]

    def write(self, ids, rows):
        order = np.argsort(ids)
        self.array[ids[order]] = rows[order]
        self.file.flush()
        _sync(self.path)


class Lmdb(Peer):
    """lmdb: `getmulti` of one cursor, integer keys; every write is a transaction, which syncs."""

    name = "lmdb"

    def build(self, path):
        env = self._environment(path)
        table = env.open_db(b"rows", integerkey=True)
        for ids in batches(self.data.rows):
            with env.begin(db=table, write=True) as transaction:
                transaction.cursor().putmulti(_items(ids, self.data.raw[ids[0] : ids[-1] + 1]), append=True)
        env.close()

    def open(self):
        self.env = self._environment(self.path)
        self.table = self.env.open_db(b"rows", integerkey=True)

    def close(self):
        self.env.close()

    def read(self, ids):
        with self.env.begin(db=self.table, buffers=True) as transaction:
            found = transaction.cursor().getmulti(_keys(ids))
            return _rows([value for _, value in found], len(ids))

    def write(self, ids, rows):
        with self.env.begin(db=self.table, write=True) as transaction:
            transaction.cursor().putmulti(_items(ids, rows))

    def _environment(self, path):
        import lmdb

        size = 2 * ROW_BYTES * self.data.rows + 2**28
        # Read-ahead hurts if little of the file is needed, as here.
        return lmdb.open(str(path), map_size=size, max_dbs=1, readahead=False)


class RocksDB(Peer):
    """RocksDB through rocksdict: MultiGet, no compression; a write is a batch, with or without a sync of the log."""

    name = "RocksDB"

    def __init__(self, data, *, mapped=True, cache_bytes=2**26):
        self._mapped, self._cache_bytes = mapped, cache_bytes
        super().__init__(data)

    def build(self, path):
        from rocksdict import Rdict, SstFileWriter

        path.mkdir()
        files = []
        for number, ids in enumerate(batches(self.data.rows, 2**20)):
            files.append(str(path / f"made-{number}.sst"))
            writer = SstFileWriter(options=self._options())
            writer.open(files[-1])
            for key, value in _items(ids, self.data.raw[ids[0] : ids[-1] + 1], ">u8"):
                writer[key] = value
            writer.finish()
        database = Rdict(str(path / "db"), self._options())
        database.ingest_external_file(files)
        database.close()
        for file in path.glob("*.sst"):
            file.unlink()

    def open(self):
        from rocksdict import Rdict, WriteOptions

        self.database = Rdict(str(self.path / "db"), self._options())
        self.synced, self.unsynced = WriteOptions(), WriteOptions()
        self.synced.sync = True

    def close(self):
        self.database.close()

    def read(self, ids):
        return _rows(self.database.get(_keys(ids, ">u8")), len(ids))

    def write(self, ids, rows, *, sync=True):
        from rocksdict import WriteBatch

        batch = WriteBatch(raw_mode=True)
        for key, value in _items(ids, rows, ">u8"):
            batch.put(key, value)
        self.database.write(batch, self.synced if sync else self.unsynced)

    def _options(self):
        from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options

        options, blocks = Options(raw_mode=True), BlockBasedOptions()
        options.set_compression_type(DBCompressionType.none())
        options.set_allow_mmap_reads(self._mapped)
        options.increase_parallelism(os.cpu_count())
        blocks.set_block_cache(Cache(self._cache_bytes))
        options.set_block_based_table_factory(blocks)
        return options


class Lance(Peer):
    """Lance: `take` of many rows in one call."""

    name = "Lance"

    def build(self, path):
        import lance

        schema = self._schema()
        lance.write_dataset(self._batches(schema), str(path), schema=schema)

    def open(self):
        os.environ.setdefault("LANCE_IO_THREADS", "64")
        import lance

        self.dataset = lance.dataset(str(self.path))

    def read(self, ids):
        column = self.dataset.take(ids, columns=["embedding"])["embedding"].combine_chunks()
        return column.flatten().to_numpy().reshape(-1, DIM)

    def _schema(self):
        import pyarrow as pa

        return pa.schema({"embedding": pa.list_(pa.float32(), DIM)})

    def _batches(self, schema):
        import pyarrow as pa

        for ids in batches(self.data.rows):
            values = pa.array(np.array(self.data.raw[ids[0] : ids[-1] + 1]).reshape(-1))
            yield pa.record_batch([pa.FixedSizeListArray.from_arrays(values, DIM)], schema=schema)


ENGINES = {each.name: each for each in (Zarr, TensorStore, H5py, Lmdb, RocksDB, Lance)}


def _keys(ids, kind="<u8"):
    whole = np.ascontiguousarray(ids, kind).tobytes()
    return [whole[start : start + 8] for start in range(0, len(whole), 8)]


def _items(ids, rows, kind="<u8"):
    whole = np.ascontiguousarray(rows).tobytes()
    values = (whole[start : start + ROW_BYTES] for start in range(0, len(whole), ROW_BYTES))
    return zip(_keys(ids, kind), values, strict=True)


def _rows(values, count):
    return np.frombuffer(b"".join(values), np.float32).reshape(count, DIM)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.close(descriptor)
