"""The power goes around votes and decisions: a partition opens at what was decided, and readers see what they may."""

import pytest
from support.partitions_power_loss import (
    NEEDED,
    STATES,
    WORKLOADS,
    explore,
    explore_partitions,
    found_without_call,
)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_at_what_was_decided(seed, elsewhere):
    assert elsewhere(explore_partitions) > min(30, STATES // WORKLOADS // 2)


def test_some_states_open_at_what_was_decided():
    assert explore(0, 15)


@pytest.mark.slow
@pytest.mark.parametrize("site", NEEDED)
def test_every_call_is_needed(site, elsewhere):
    """Left out, as if the disk never got it, some state is wrong."""
    assert elsewhere(found_without_call)
