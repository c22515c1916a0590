"""The power goes around votes and decisions: a partition opens at what was decided, and readers at what they may see."""

import pytest
from support.partitions_power_loss import STATES, WORKLOADS, explore, explore_partitions


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_at_what_was_decided(seed, elsewhere):
    assert elsewhere(explore_partitions) > min(30, STATES // WORKLOADS // 2)


def test_some_states_open_at_what_was_decided():
    assert explore(0, 15)
