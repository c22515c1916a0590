"""Rows in memory: the mapped shards of a table, the slots of rows that changed, and how a batch runs on both.

Only row ids are known here; keys are the business of ``vocabulary``. ``table_state.py`` has what one table needs. What
a commit is, and which tables a store has, is known in ``store``.
"""
