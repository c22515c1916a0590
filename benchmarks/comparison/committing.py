"""Commits: a few rows, durably, and one percent of a table (W5, W8)."""

import os
from dataclasses import replace

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import ROW_BYTES

from . import memory, peers
from .data import ids_of, remove, warm
from .racing import Contender, race, same_bytes
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
