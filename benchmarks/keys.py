"""Vocabularies: keys per second, alone and against alternatives, and the memory and disk space that they take."""

import importlib.util
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import shardemb

from . import common
from .ratios import _ratio
from .scale import anonymous_bytes

BATCH = max(4096, int(262_144 * common.SCALE))
"""Keys of a lookup."""

SIZES = [common.scaled(10**6), 2 * common.scaled(5 * 10**6), 4 * common.scaled(25 * 10**6)]
KINDS = ["known", "unknown", "mixed"]


def integers(numbers):
    """Return keys that look like hashes: a function of the numbers, in no order."""
    return (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def strings(numbers):
    """Return words of 8 or 16 letters, as an Arrow array."""
    return pa.array([f"{word & 0xFFFFFFFF:08x}" * (1 + word % 2) for word in integers(numbers).tolist()])


def asked(kind, size):
    """Draw the numbers of keys to look up; the first `size` are known."""
    numbers = common.random.integers(0, size, BATCH)
    if kind != "known":
        numbers[:: 2 if kind == "mixed" else 1] += size
    return numbers


class Keys(common.Timed):
    """A vocabulary of integers, by its size."""

    params = [SIZES, KINDS]
    param_names = ["keys", "asked"]
    timeout = 600

    def setup_cache(self):
        """Fill the vocabularies; return the speed and memory of that, by size."""
        return {size: filled(size) for size in SIZES}

    def setup(self, took, size, kind):
        self.vocabulary = common.store(path_of(size)).vocabularies["v"]
        self.keys = integers(asked(kind, size))
        self.vocabulary.lookup(self.keys)

    def time_lookup(self, *_):
        """262,144 keys at full scale."""
        self.vocabulary.lookup(self.keys)

    def track_keys_added_per_second(self, took, size, _):
        """While the vocabulary was filled, without commits."""
        return took[size][0]

    def track_anonymous_bytes(self, took, size, _):
        """Peak growth of memory while it was filled."""
        return took[size][1]

    def track_bytes_on_disk_per_key(self, _, size, __):
        """Keys and index."""
        stats = self.vocabulary.stats()
        return (stats["bytes_on_disk"] + stats["index_bytes_on_disk"]) / size

    track_keys_added_per_second.unit = "keys/s"
    track_anonymous_bytes.unit = track_bytes_on_disk_per_key.unit = "bytes"


def path_of(size):
    """Return the path of a store in the current folder."""
    return str(Path(f"keys-{size}.zarr").absolute())


def filled(size):
    """Fill a vocabulary with `size` keys; return the keys per second and the memory that it took."""
    with shardemb.open(path_of(size), mode="w", memory_budget=256 * 2**20) as store:
        vocabulary = store.create_vocabulary("v", key_type="int64")
        store.commit()
        before, most, seconds = anonymous_bytes(), 0, 0.0
        for start in range(0, size, BATCH):
            keys = integers(np.arange(start, min(start + BATCH, size)))
            started = time.perf_counter()
            vocabulary.add(keys)
            seconds += time.perf_counter() - started
            most = max(most, anonymous_bytes())
            if start // BATCH % 8 == 7:
                store.commit()
        store.commit()
    return size / seconds, most - before


class KeysRatio(common.Timed):
    """Time of a lookup as a multiple of the peer's, with the same keys. Below 1 is faster."""

    params = [["int64", "string"], KINDS]
    param_names = ["type", "asked"]
    timeout = 300
    size = common.scaled(4_000_000)
    store = None

    def setup(self, key_type, kind):
        self.folder = tempfile.mkdtemp()
        self.store = shardemb.open(Path(self.folder) / "s.zarr")
        self.vocabulary = self.store.create_vocabulary("v", key_type=key_type)
        self.keys_of = integers if key_type == "int64" else strings
        self.all = self.keys_of(np.arange(self.size))
        self.vocabulary.add(self.all)
        self.store.commit()
        self.kind = kind

    def teardown(self, *_):
        if self.store is not None:  # None if the peer is missing
            self.store.close()
            shutil.rmtree(self.folder)

    def track_lookup_vs_dict(self, *_):
        """A dict of Python objects; the keys are in a list already."""
        rows = {key: row for row, key in enumerate(self.all.tolist())}
        return self._against(lambda _, keys: [rows.get(key, -1) for key in keys])

    def track_lookup_vs_arrow(self, *_):
        """`pyarrow.compute.index_in`, which builds a hash table of all keys in each call."""
        values = pa.array(self.all)
        return self._against(
            lambda keys, _: pc.fill_null(pc.index_in(pa.array(keys), value_set=values), -1).to_numpy()
        )

    def _against(self, theirs):
        """Measure against `theirs`, which gets the keys as an array and as a list, and uses what suits it."""

        def fresh():
            keys = self.keys_of(asked(self.kind, self.size))
            return keys, keys.tolist()

        return _ratio(fresh, lambda keys: self.vocabulary.lookup(keys[0]), lambda keys: theirs(*keys))

    track_lookup_vs_dict.unit = track_lookup_vs_arrow.unit = "times the peer"


class KeysRatioLmdb(KeysRatio):
    """The same against lmdb, if it is installed."""

    track_lookup_vs_dict = track_lookup_vs_arrow = None

    def setup(self, key_type, kind):
        if importlib.util.find_spec("lmdb") is None:
            raise NotImplementedError
        super().setup(key_type, kind)

    def track_lookup_vs_lmdb(self, *_):
        """One transaction, with a `get` for each key."""
        import lmdb

        def encode(key):
            return key.to_bytes(8, "little", signed=True) if isinstance(key, int) else key.encode()

        with lmdb.open(str(Path(self.folder) / "lmdb"), map_size=2**34, sync=False) as environment:
            with environment.begin(write=True) as transaction:
                for row, key in enumerate(self.all.tolist()):
                    transaction.put(encode(key), row.to_bytes(8, "little"))
            with environment.begin() as transaction:
                none = (-1).to_bytes(8, "little", signed=True)
                return self._against(
                    lambda _, keys: np.frombuffer(
                        b"".join([transaction.get(encode(key), none) for key in keys]), np.int64
                    )
                )

    track_lookup_vs_lmdb.unit = "times the peer"
