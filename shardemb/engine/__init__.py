"""Tables in memory: the mapped shards of each, what one opening of a store has, and how a batch runs.

Only row ids are known here; keys are the business of ``vocabulary``. ``table_state.py`` has what one table needs. Which
tables a store has, and when they are committed, is known in ``session``.
"""
