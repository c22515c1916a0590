"""Commits: a few rows, durably; one percent of a table; rows of which nothing is in memory (W5, W8, W16)."""

import os
from dataclasses import replace

import numpy as np

import shardemb
from benchmarks import common, pagecache
from benchmarks.common import ROW_BYTES

from . import memory, peers
from .data import ids_of, remove, warm
from .racing import Contender, Reopened, drop_caches, race, same_bytes
from .reading import FULL
from .results import Case, at_most, faster

UPDATED = 1000
ENGINES = {"RocksDB": None, "lmdb": 10, "h5py": 3, "zarr": 3, "tensorstore": 3}
"""Engines whose writes are durable, and how often to repeat them; None: as often as the race."""

OURS = "write + commit"


# ---- W5: a durable update of a few rows ---------------------------------------------------------------------------


def durable_update(settings):
    """W5: 1,000 warm random rows are on disk when the call returns."""
    data = settings.data(FULL)
    size = min(UPDATED, data.rows // 4)
    path = data.store("updated")
    opened = [peers.ENGINES[name](data) for name in ENGINES if peers.has(name)]
    for peer in opened:
        peer.open()
    with shardemb.open(path) as store:
        table = store["rows"]
        warm(table)

        def ours(batch):
            table.write(*batch)
            store.commit()

        contenders = [Contender(OURS, ours)]
        contenders += [
            Contender(peer.name, lambda batch, peer=peer: peer.write(*batch), repetitions=ENGINES[peer.name])
            for peer in opened
        ]
        make = _distinct_writes(data.rows)
        equal = _all_write(make(size), contenders, {OURS: table.lookup} | {p.name: p.read for p in opened})
        arms = race(contenders, make, size, settings.times(30))
    for peer in opened:
        peer.remove()
    limit = size / (settings.machine.sync_s + size * (ROW_BYTES + 8) / settings.machine.write_bytes_per_s)
    bars = (
        at_most(f"{OURS}, 1,000 rows", 1e3 * arms[OURS].median, 5.0, "ms"),
        faster(arms, OURS, "lmdb", 20.0),
        faster(arms, OURS, "zarr", 200.0),
        faster(arms, OURS, "tensorstore", 200.0),
        faster(arms, OURS, "RocksDB", 1 / 3),
    )
    case = Case("1,000 rows", tuple(arms.values()), bars, equal, limit, ("every arm syncs",))
    work = memory.Work(data.rows, size, "uniform", 60, commit_every=1)
    return [case, memory.check("W5", work, settings)]


def _distinct_writes(rows):
    ids = ids_of("uniform", rows)

    def make(size):
        unique = np.unique(ids(size + size // 4 + 64))  # ascending, as h5py requires
        chosen = np.sort(common.random.permutation(unique)[:size])
        return chosen, common.make_values(chosen.size)

    return make


def _all_write(batch, contenders, readers):
    """Check that everyone writes the same rows and reads them back."""
    for each in contenders:
        each.call(batch)
        if not same_bytes(readers[each.name](batch[0]), batch[1]):
            raise AssertionError(f"{each.name} returned other bytes")
    return True


# ---- W8: one percent of a table -----------------------------------------------------------------------------------

GROWING = 4
"""Commits after which the log is large enough for the next one, as after a while of training."""


def incremental(settings):
    """W8: what a commit writes after 1 % of the rows changed, against saving the whole table."""
    data = settings.data(FULL)
    size = data.rows // 100
    saved = data.folder / "saved.npy"
    written, changed = [], []
    with shardemb.open(data.store("updated")) as store:
        table = store["rows"]
        warm(table)

        def change():
            ids = ids_of("uniform", data.rows)(2 * size)
            changed.append(common.random.permutation(np.unique(ids))[:size])
            table.write(changed[-1], common.make_values(size))

        def ours(_):
            before = store.stats()["bytes_written"]
            store.commit()
            written.append((store.stats()["bytes_written"] - before) / (size * ROW_BYTES))

        for _ in range(GROWING):
            change()
            ours(None)
        grown = len(written)
        contenders = [Contender("commit", ours, prepare=change)]
        save = Contender("np.save + fsync", lambda _: _save(saved, data.array), repetitions=3)
        contenders.append(replace(save, prepare=lambda: remove(saved)))
        arms = race(contenders, lambda _: None, size, settings.times(9))
        before = store.stats()["bytes_written"]
        store.checkpoint()
        distinct = np.unique(np.concatenate(changed)).size
        later = (store.stats()["bytes_written"] - before) / (distinct * ROW_BYTES)
        equal = _reads_back(data.store("updated"), store)
    remove(saved)
    steady = float(np.median(written[grown:]))
    bars = (
        at_most("bytes written in commit, of the changed records", steady, 1.3, "x"),
        faster(arms, "commit", "np.save + fsync", 20.0),
    )
    notes = (
        f"bytes of the first {grown} commits, in which the log grows: {np.mean(written[:grown]):.2f} times theirs",
        f"folding all {len(changed)} commits at once writes {later:.1f} times the changed records later",
    )
    facts = {
        "written_in_commit": steady,
        "written_while_growing": float(np.mean(written[:grown])),
        "written_by_fold": later,
    }
    limit = 1 / (settings.machine.sync_s / size + ROW_BYTES / settings.machine.write_bytes_per_s)
    return [Case("1 % of the rows", tuple(arms.values()), bars, equal, limit, notes, facts)]


def _save(path, array):
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _reads_back(path, store):
    """Return whether another reader sees what was committed."""
    ids = common.make_ids("uniform", store["rows"].num_embeddings, 4096)
    with shardemb.open(path, mode="r") as reader:
        return same_bytes(reader["rows"].lookup(ids), store["rows"].lookup(ids))


# ---- W16: rows of which nothing is in memory ----------------------------------------------------------------------

MANY = 65_536
COLD, WARM_OURS = "cold write + commit", "warm write + commit"


def cold_writes(settings):
    """W16: whole rows need nothing of what they replace, so a cold table should be as fast as a warm one."""
    data = settings.data(FULL)
    peer = peers.RocksDB(data) if peers.has("RocksDB") else None
    if peer is not None:
        peer.open()
    cases = [_cold_writes(settings, data, full_size, peer) for full_size in (UPDATED, MANY)]
    if peer is not None:
        peer.remove()
    return cases


def _cold_writes(settings, data, full_size, peer):
    size = min(full_size, data.rows // 4)
    ours = _ColdWriter(data.store("updated"))
    contenders = [
        Contender(COLD, ours.write_cold, prepare=ours.make_cold),
        Contender(WARM_OURS, ours.write, prepare=ours.make_warm),
    ]
    readers = {COLD: ours.read, WARM_OURS: ours.read}
    if peer is not None:

        def reopen():
            peer.close()
            drop_caches(peer.path)
            peer.open()

        contenders.append(Contender(peer.name, lambda batch: peer.write(*batch), prepare=reopen))
        readers[peer.name] = peer.read
    make = _distinct_writes(data.rows)
    for each in contenders:
        each.prepare()
        _all_write(make(size), [each], readers)
    ours.bytes_read.clear()  # this may have loaded kernels
    arms = race(contenders, make, size, settings.times(9))
    ours.close()
    bars = [
        at_most("cold vs warm", arms[COLD].median / arms[WARM_OURS].median, 1.3, "x"),
        at_most("bytes read from the disk, at most", max(ours.bytes_read), 0.0, "bytes"),
    ]
    if full_size == MANY:
        bars.append(faster(arms, COLD, "RocksDB", 1.0))
    notes = ("every arm syncs, and opens its files anew before each call", "RocksDB is as cold as ours")
    limit = size / (settings.machine.sync_s + size * (ROW_BYTES + 8) / settings.machine.write_bytes_per_s)
    return Case(f"{size:,} rows", tuple(arms.values()), tuple(bars), True, limit, notes)


class _ColdWriter(Reopened):
    """Opens one store again and again, of which all or nothing is in memory."""

    def __init__(self, path):
        super().__init__(path)
        self.bytes_read = []

    def make_warm(self):
        self.make_cold()
        warm(self.store["rows"])

    def write(self, batch):
        self.store["rows"].write(*batch)
        self.store.commit()

    def write_cold(self, batch):
        before = pagecache.bytes_read()
        self.write(batch)
        self.bytes_read.append(pagecache.bytes_read() - before)

    def read(self, ids):
        return self.store["rows"].lookup(ids)
