"""The power goes while keys are added and removed: every state opens at a commit, with its keys in their rows."""

import pytest
from support.keys_power_loss import (
    NEEDED,
    STATES,
    WORKLOADS,
    explore_keys,
    explore_short_rows,
    found_without_call,
    work,
    work_short,
)
from support.power_loss import explore


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_with_the_keys_of_a_commit(seed, elsewhere):
    assert len(elsewhere(explore_keys)) > min(50, STATES // WORKLOADS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_with_the_short_rows_of_a_commit(seed, elsewhere):
    assert len(elsewhere(explore_short_rows)) > min(50, STATES // WORKLOADS // 2)


@pytest.mark.parametrize("each", [work, work_short])
def test_some_states_open_with_the_keys_of_a_commit(each):
    explore(0, 40, work=each)


@pytest.mark.slow
@pytest.mark.parametrize("site", NEEDED)
def test_every_call_is_needed(site, elsewhere):
    """Left out, as if the disk never got it, some state does not open with all keys."""
    assert elsewhere(found_without_call)
