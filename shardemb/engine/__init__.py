"""Rows in memory: the mapped shards of a table, the slots of rows that changed, and how a batch runs on both.

Row ids only: keys are the business of ``vocabulary``. What one table needs is in ``table_state.py``; what a commit is,
and which tables a store has, is known above, in ``store``.
"""
