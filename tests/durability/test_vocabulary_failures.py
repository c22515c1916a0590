"""Operations on files fail once while keys are added and removed: no key is lost, and none gets two rows."""

import pytest
from support.keys_failures import WORKLOADS, fail_every_site, fail_some, trained


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_operations_fail_once(seed, elsewhere):
    assert "opened" in elsewhere(fail_every_site)


def test_the_calls_that_fail_are_of_every_kind():
    sites = [trained(seed).sites for seed in range(WORKLOADS)]
    assert {"write", "sync", "rename", "opened", "remove"} <= {name for each in sites for name, *_ in each}


def test_some_operations_fail_once():
    assert len(fail_some(4, most=12)) > 2
