"""Operations on files fail once while keys are added and removed: no key is lost, and none gets two rows."""

import pytest
from support.keys_failures import WORKLOADS, fail_every_site, fail_some


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_operations_fail_once(seed, elsewhere):
    assert {"write", "sync", "rename", "opened"} <= elsewhere(fail_every_site).keys()


def test_some_operations_fail_once():
    assert len(fail_some(4, most=12)) > 2
