"""The power goes while commits are kept under names: the store opens at the last one, and each tag is what it was."""

import pytest
from support.tags_power_loss import NEEDED, STATES, WORKLOADS, explore, explore_tags, found_without_call


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_at_the_last_commit_with_its_tags(seed, elsewhere):
    assert elsewhere(explore_tags) > min(30, STATES // WORKLOADS // 2)


def test_some_states_open_at_the_last_commit_with_their_tags():
    assert explore(0, 15)


@pytest.mark.slow
@pytest.mark.parametrize("site", NEEDED)
def test_every_call_is_needed(site, elsewhere):
    """Left out, as if the disk never got it, some state is wrong."""
    assert elsewhere(found_without_call)
