"""The machines of a distributed store in a world where everything fails; the soak has 50,000 histories and all mutants.

pytest -n 0 -m soak -s tests/protocol/test_partition_model.py
"""

import os
from collections import Counter

import pytest
from support.partition_model import World
from support.partition_mutants import MUTANTS, tried

SOAK = float(os.environ.get("SHARDEMB_SOAK", "1"))
"""Size of the soak; 1.0 is all of it."""
FIRST = int(os.environ.get("SHARDEMB_SOAK_SEED", "0"))
"""The first seed of its histories."""
CLEAREST = ("no cut", "one vote too few", "no rollback", "applied again", "commit alone")
HAPPENED = {
    "acknowledged commits", "openings in doubt", "commits decided at take-over", "partitions refused", "suspicions",
    "kills", "power losses", "pauses", "folds", "full disks", "copies of heads", "copies of partitions",
    "openings without disk", "reads checked", "changes taken back",
}  # fmt: skip


def lived(seeds):
    """Let worlds with these seeds live; return what happened in them."""
    seen = Counter()
    for seed in seeds:
        seen += World(seed).run()
    return seen


def test_nothing_acknowledged_is_lost_or_mixed_and_it_always_comes_up():
    seen = lived(range(300))
    assert {each for each in HAPPENED if seen[each]} == HAPPENED
    assert seen["acknowledged commits"] > 100


@pytest.mark.parametrize("name", CLEAREST)
def test_a_rule_that_is_undone_is_noticed(name):
    found = tried(name, MUTANTS[name].histories, enough=1)
    assert found.wrong + found.stuck, MUTANTS[name].rule


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_histories():
    count = int(50_000 * SOAK)
    seen = lived(range(FIRST, FIRST + count))
    print(f"\nsoak: seeds from {FIRST}:", ", ".join(f"{seen[name]:,} {name}" for name in sorted(seen)))


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", MUTANTS)
def test_every_rule_that_is_undone(name):
    mutant = MUTANTS[name]
    found = tried(name, mutant.histories)
    print(f"\nsoak: {name}: {mutant.rule}: {found}")
    assert found.wrong + found.stuck or mutant.unless
