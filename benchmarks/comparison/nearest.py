"""Nearest neighbours: an exact search, warm and cold (I4), and through an index (I5), against usearch's own vectors."""

import numpy as np

import shardemb
from benchmarks.common import DIM

from . import peers
from .data import remove, warm
from .racing import Contender, Reopened, drop_caches, race, read_files
from .reading import FULL
from .results import Bar, Case, at_most, faster

QUERIES, K = 100, 10


def _make_queries(count):
    return np.random.default_rng().standard_normal((count, DIM), np.float32)


# ---- I4: exact ----------------------------------------------------------------------------------------------------

OURS, NUMPY, READ = "search", "NumPy sgemm + argpartition in RAM", "one sequential read of the files"


def exact(settings):
    """I4: the 10 rows with the greatest products with each of 100 queries."""
    data = settings.data(FULL)
    return [_warm(settings, data), _cold(settings, data)]


def _warm(settings, data):
    array = data.array

    def numpy(queries):
        scores = queries @ array.T
        best = np.argpartition(scores, scores.shape[1] - K, axis=1)[:, -K:]
        return np.sort(np.take_along_axis(scores, best, 1), axis=1)[:, ::-1]

    with shardemb.open(data.store(), mode="r") as store:
        table = store["rows"]
        warm(table)

        def ours(queries):
            return table.search(queries, K, metric="dot").scores

        given = _make_queries(QUERIES)
        equal = np.allclose(ours(given), numpy(given), 1e-4, 1e-4)
        arms = race(
            [Contender(OURS, ours), Contender(NUMPY, numpy, prepare=array.max)],
            _make_queries,
            QUERIES,
            settings.times(5),
        )
    note = "rows are queries"
    return Case(
        "warm, dot",
        tuple(arms.values()),
        (faster(arms, OURS, NUMPY, 0.8, stretch=2.0),),
        equal,
        None,
        (note,),
    )


def _cold(settings, data):
    path = data.store()
    cold = Reopened(path)
    contenders = [
        Contender(OURS, lambda queries: cold.store["rows"].search(queries, K), prepare=cold.make_cold),
        Contender(READ, lambda _: read_files(path), prepare=lambda: (cold.close(), drop_caches(path))),
    ]
    arms = race(contenders, _make_queries, QUERIES, settings.times(3), keep=False)
    cold.close()
    bars = (faster(arms, OURS, READ, 0.8, stretch=0.95),)
    return Case("cold, cosine", tuple(arms.values()), bars, True, None, ("rows are queries",))


# ---- I5: through an index -----------------------------------------------------------------------------------------

ROWS, KINDS, ASKED = 1_000_000, 1000, 1000
INDEX, OWN = "index.search", "usearch with its own float32 vectors"


def _clustered(rows):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((KINDS, DIM), np.float32)
    return centres[rng.integers(0, KINDS, rows)] + rng.standard_normal((rows, DIM), np.float32) / 2


def indexed(settings):
    """I5: the 10 nearest of clustered rows by cosine; recall, bytes of the index, queries a second."""
    if not peers.has("usearch"):
        return [Case("clustered, cosine", (), (faster({}, INDEX, OWN, 0.7),), True)]
    from usearch.index import Index

    rows = settings.rows(ROWS)
    values = _clustered(rows)
    path, theirs = settings.folder / "nearest.index", settings.folder / "nearest.usearch"
    with shardemb.open(settings.folder / "nearest.zarr", mode="w") as store:
        table = store.create_table("rows", num_embeddings=rows, embedding_dim=DIM, initializer=values)
        store.commit()
        index = table.build_index(path)
        own = Index(ndim=DIM, metric="cos", dtype="f32")
        own.add(np.arange(rows), values)
        own.save(str(theirs))

        def make(count):
            noise = np.random.default_rng().standard_normal((count, DIM), np.float32) / 20
            return values[np.random.default_rng().integers(0, rows, count)] + noise

        contenders = [
            Contender(INDEX, lambda queries: index.search(queries, K).ids),
            Contender(OWN, lambda queries: own.search(queries, K).keys),
        ]
        given = make(ASKED)
        expected = table.search(given, K).ids
        recalls = [
            float(np.mean([np.isin(*pair).mean() for pair in zip(expected, each.call(given), strict=True)]))
            for each in contenders
        ]
        arms = race(contenders, make, ASKED, settings.times(10))
    share = path.stat().st_size / theirs.stat().st_size
    bars = (
        faster(arms, INDEX, OWN, 0.7, stretch=1.0),
        Bar("recall at 10", recalls[0], 0.98, ""),
        at_most("bytes of the index vs usearch's", share, 0.36, "x", 0.35),
    )
    notes = (f"recall {recalls[0]:.4f}, usearch {recalls[1]:.4f}", "rows are queries")
    for each in (path, theirs, settings.folder / "nearest.zarr"):
        remove(each)
    return [Case("clustered, cosine", tuple(arms.values()), bars, recalls[0] > 0.9, None, notes)]
