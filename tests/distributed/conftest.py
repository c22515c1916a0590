"""A cluster of processes on this machine for each module of tests, and a distributed store on it for each test."""

import warnings

import pytest


@pytest.fixture(scope="module")
def cluster():
    """Two workers, each with a nanny."""
    pytest.importorskip("distributed.client", reason="distributed is not installed")
    from support.clusters import Cluster

    with Cluster(workers=2) as cluster:
        yield cluster


@pytest.fixture
def new_store(cluster, tmp_path):
    """``new_store()`` creates or opens the test's distributed store; what is left open is closed."""
    opened = []

    def new_store(**options):
        if not (tmp_path / "head.zarr").exists():
            options = {"owners": cluster.owners(tmp_path), "partitions": 4} | options
        opened.append(cluster.open(tmp_path / "head.zarr", **options))
        return opened[-1]

    yield new_store
    with warnings.catch_warnings(
        action="ignore", category=RuntimeWarning
    ):  # what is lost is the point, or no matter
        for store in opened:
            store.close()
