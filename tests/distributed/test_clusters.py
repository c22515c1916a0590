"""What is said about workers that are no good owners."""

import pytest

pytest.importorskip("distributed.client", reason="distributed is not installed")

from shardemb.distributed import clusters

GOOD = {name: str(value) for name, value in clusters.ENVIRONMENT.items()}
UNLIMITED = {"tcp://a": {"memory_limit": None}, "tcp://b": {"memory_limit": 0}}


def test_good_owners_are_not_complained_of():
    assert list(clusters.complaints(UNLIMITED, {"tcp://a": GOOD, "tcp://b": GOOD})) == []
    assert (
        list(clusters.complaints(UNLIMITED, {"tcp://a": dict.fromkeys(GOOD)})) == []
    )  # glibc adapts by itself


def test_a_memory_limit_is_named_with_the_line_to_set():
    workers = UNLIMITED | {"tcp://b": {"memory_limit": 10**9}}
    (found,) = clusters.complaints(workers, {"tcp://a": GOOD, "tcp://b": GOOD})
    assert "tcp://b have a memory limit" in found
    assert "dask worker --memory-limit 0" in found
    assert list(clusters.complaints(workers, {"tcp://a": GOOD})) == []  # the other one owns nothing


def test_an_allocator_that_gives_memory_back_is_named_with_the_lines_to_set():
    settings = {"tcp://a": GOOD, "tcp://b": GOOD | {"MALLOC_TRIM_THRESHOLD_": "65536"}}
    (found,) = clusters.complaints(UNLIMITED, settings)
    assert "tcp://b give memory back" in found
    assert "MALLOC_TRIM_THRESHOLD_=2147483648" in found


@pytest.mark.parametrize("workers", [0, -1])
def test_a_cluster_has_workers(workers):
    with pytest.raises(ValueError, match="workers"):
        clusters.local_cluster(workers)
