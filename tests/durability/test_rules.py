"""Each rule that durability rests on, undone in its simplest way, is noticed.

`UNDONE` maps a rule to what undoes it and to the witness that must notice: a function that returns what is wrong, or
None. Every witness finds nothing wrong while the rules hold; the witness of most is a power cut on a simulated disk.
"""

import re

import pytest
from support.rules import POWER, UNDONE, noticed

# ---- witnesses --------------------------------------------------------------------------------------------------


# ---- rules ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", UNDONE)
def test_rule_undone_is_noticed(rule, elsewhere):
    assert elsewhere(noticed)


@pytest.mark.parametrize("witness", sorted({each for _, each in UNDONE.values()} - set(POWER), key=str))
def test_rules_hold(witness):
    assert witness() is None


def test_every_rule_is_here():
    assert {int(re.match(r"R(\d+) ", rule)[1]) for rule in UNDONE} == set(range(1, 35))
