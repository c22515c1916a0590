"""Compile all kernels ahead, so that no later process waits for it: while an image is built, or before a measurement.

A kernel is compiled when it is first called, for each optimizer, initializer and type of keys once. So tiny stores are
used in every way, in a temporary folder. Of the many pairs of optimizers and dtypes of rows, only Adam on bfloat16 is
compiled ahead, and what lookups and writes of the other dtypes need.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import shardemb
from shardemb.base.progress import track
from shardemb.dtypes import BlockScaled, ScaledInt8
from shardemb.initializers import INITIALIZERS, Constant, Uniform
from shardemb.optim import OPTIMIZERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardemb.base.progress import Progress
    from shardemb.dtypes import DtypeLike
    from shardemb.initializers import Initializer
    from shardemb.optim import Optimizer
    from shardemb.vocabulary.keys import KeyType

_MANY = 50_000
"""So many rows in a batch are sorted, cut into tasks and spilled as large batches are."""


def warm_up(progress: Progress = None) -> None:
    """Compile the kernels that are not in numba's cache yet, and put them there.

    Parameters
    ----------
    progress : bool or callable, optional
        True shows a bar; a function is called as ``progress(done, total)``, in tables tried.

    Examples
    --------
    >>> warm_up()
    """
    from shardemb.compute import compiler

    compiler.announcer.silence()  # it would advise to do this
    make: dict[str, Callable[..., Optimizer]] = dict(OPTIMIZERS)
    optimizers = [kind(lr=0.1) for kind in make.values()]
    initializers = [Uniform(-1.0, 1.0) if kind is Uniform else kind() for kind in INITIALIZERS.values()]
    key_types: list[KeyType] = ["int64", "string", "bytes"]
    dtypes: list[DtypeLike] = [
        "float32",
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        ScaledInt8(),
        BlockScaled(),
    ]
    with (
        tempfile.TemporaryDirectory(prefix="shardemb-") as folder,
        warnings.catch_warnings(),
        track(
            len(optimizers) + len(initializers) + len(key_types) + len(dtypes),
            "compiling kernels",
            unit="table",
            progress=progress,
        ) as advance,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # of changes that are not committed
        path = Path(folder) / "store"
        for optimizer in optimizers:
            _train(path, optimizer, Constant(0.0))
            advance(1)
        for initializer in initializers:
            _train(path, optimizers[0], initializer)
            advance(1)
        for key_type in key_types:
            _train_by_key(path, key_type)
            advance(1)
        for dtype in dtypes:
            _convert(path, dtype)
            advance(1)


def _train(path: Path, optimizer: Optimizer, initializer: Initializer) -> None:
    ids = np.arange(_MANY)
    with shardemb.open(path, "w", memory_budget=0) as store:
        table = store.create_table(
            "t", num_embeddings=2 * _MANY, embedding_dim=2, optimizer=optimizer, initializer=initializer
        )
        assert isinstance(table, shardemb.Table)
        for some in (ids[:10], ids):
            table.lookup(some)
            table.lookup_unique(some)
            table.update(some, np.ones((some.size, 2), np.float32))
            table.write(some, np.ones((some.size, 2), np.float32))
            store.commit()
            table.write(some, np.ones((some.size, 2), np.float32))
            store.rollback()
        _use_bags(table)
        table.prefetch(ids, for_update=True)
        table.resize(2 * _MANY + 10)
        store.commit()
        store.checkpoint()
        store.verify()
    with shardemb.open(path, "r") as store:
        table = store["t"]
        assert isinstance(table, shardemb.Table)
        table.lookup(ids)
        table.prefetch(ids)
        table.explain(ids)
        table.warm(ids)
        table.warm()
        for metric in ("cosine", "dot", "l2"):
            table.search(np.ones((1, 2)), 1, metric=metric)
        table.to_arrow_batches().read_all()


def _use_bags(table: shardemb.Table) -> None:
    ids, grads = [[1, 2], [2, 3]], np.ones((2, 2), np.float32)
    for weights in (None, np.ones((2, 2), np.float32)):
        for mode in ("sum", "mean"):
            table.lookup_bag(ids, mode=mode, weights=weights)
            table.bag_weight_gradient(ids, None, grads, mode=mode, weights=weights)
            table.update_bag(ids, None, grads, mode=mode, weights=weights)
    table.update_bag(ids, None, grads, mode="max")


def _convert(path: Path, dtype: DtypeLike) -> None:
    ids = np.arange(100)
    with shardemb.open(path, "w") as store:
        trained = dtype == "bfloat16"
        for rounding in ("nearest", "stochastic") if trained else ("nearest",):
            table = store.create_table(
                rounding,
                num_embeddings=100,
                embedding_dim=2,
                dtype=dtype,
                rounding=rounding,
                optimizer=shardemb.optim.Adam() if trained else None,
            )
            assert isinstance(table, shardemb.Table)
            table.write(ids, np.ones((100, 2), np.float32))
            for form in ("float32", "bfloat16", "raw", *["float16"] * (dtype in ("float32", "bfloat16"))):
                table.lookup(ids, dtype=form)
            if trained:
                table.update(ids, np.ones((100, 2), np.float32))


def _train_by_key(path: Path, key_type: KeyType) -> None:
    some: list[Any] = list(range(3000))
    if key_type != "int64":
        some = [f"{key}" if key_type == "string" else b"%d" % key for key in some]
    with shardemb.open(path, "w") as store:
        for name, admission in (("v", None), ("w", shardemb.Admission(after=2))):
            store.create_vocabulary(name, key_type=key_type, admission=admission)
            table = store.create_table(
                name, vocabulary=name, embedding_dim=2, optimizer=shardemb.optim.SGD(lr=0.1), counters=True
            )
            assert isinstance(table, shardemb.KeyedTable)
            for _ in range(2):
                table.lookup(some, create=True, missing="initial")
            table.update(some, np.ones((len(some), 2), np.float32))
            store.commit()
            table.evict(keep=1000)
            store.commit()
            table.vocabulary.add(some)
            table.vocabulary.keys(table.vocabulary.lookup(list(table)))
            store.rollback()
        store.commit()
        words = path.with_name("words.bin")
        store["v"].export(words)
        store.import_table("words", words, "word2vec-binary")
        store.rollback()
    with shardemb.open(path, "r") as store:
        table = store["v"]
        assert isinstance(table, shardemb.KeyedTable)
        table.lookup(some, missing="zeros")
        table.to_arrow_batches().read_all()
