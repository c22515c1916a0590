"""The power goes while tables are filled before the commit: every state opens at exactly the last commit."""

import pytest
from support.fills_power_loss import (
    NEEDED,
    STATES,
    WORKLOADS,
    explore_fills,
    explore_fills_behind,
    found_without_call,
    work,
)
from support.power_loss import explore


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_at_the_last_commit(seed, elsewhere):
    assert len(elsewhere(explore_fills)) > min(50, STATES // WORKLOADS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS // 2))
def test_every_state_of_commits_in_the_background_opens_at_the_last_one(seed, elsewhere):
    assert len(elsewhere(explore_fills_behind)) > min(50, STATES // WORKLOADS // 2)


def test_some_states_open_at_the_last_commit():
    explore(0, 40, work=work, readers=True)


@pytest.mark.slow
@pytest.mark.parametrize("site", NEEDED)
def test_every_call_is_needed(site, elsewhere):
    """Left out, as if the disk never got it, some state does not open at the last commit."""
    assert elsewhere(found_without_call)
