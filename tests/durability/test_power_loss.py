"""The power goes after any operation on a simulated disk, and the store opens at exactly the last commit.

A workload runs on a real folder while every call that changes a disk is recorded. A crash state is what a disk may hold
at one point of the recording: what was synced is there, and of everything else any subset, each write torn at
512 bytes, each new name or rename there or not. Some crash states are opened on such a disk too, and crash again.
"""

import pytest
from support.power_loss import (
    LEFT_OUT,
    OTHER_REASONS,
    SITES,
    STATES,
    WORKLOADS,
    explore_all,
    explore_behind,
    found_without_barrier,
    found_without_call,
    is_about_fills,
    is_about_keys,
    is_about_partitions,
    is_about_tags,
)

# ---- the simulated disk -----------------------------------------------------------------------------------------


# ---- workloads --------------------------------------------------------------------------------------------------


# ---- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_state_opens_at_the_last_commit(seed, elsewhere):
    seen = elsewhere(explore_all)
    assert len(seen) > min(50, STATES // WORKLOADS // 2)  # a short workload has few states that differ


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS // 3))
def test_every_state_of_commits_in_the_background_opens_at_the_last_one(seed, elsewhere):
    seen = elsewhere(explore_behind)
    assert len(seen) > min(50, STATES // WORKLOADS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_left_out_is_noticed(what, elsewhere):
    """Each barrier is there for a reason: without it, some state does not open at the last commit."""
    assert elsewhere(found_without_barrier)


# ---- every call site --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "site",
    [
        each
        for each in SITES
        if each not in OTHER_REASONS
        and not (
            is_about_keys(each) or is_about_fills(each) or is_about_tags(each) or is_about_partitions(each)
        )
    ],
)  # those: test_{vocabulary,fills,tags,partitions}_power_loss.py
def test_every_call_is_needed(site, elsewhere):
    """Left out, as if the disk never got it, some state does not open at the last commit."""
    assert elsewhere(found_without_call)
