"""Which workload shows that a call, a barrier or a rule of durability is needed.

Without it, some state of the workload of this seed does not open at the last commit. The seeds save time and decide
nothing: where one no longer shows it, or is missing, all workloads are searched. Look for new ones when many are
outdated: each is one that the search finds, the one of the first few that fails soonest.
"""

WITNESSES = {}
