"""What users hold, and what makes it durable: `Store`, `Table`, `KeyedTable` and `Vocabulary` are contracts alone.

Each of their methods is one call of what is behind them: of a `Session` (one opening of a store) or of the rooms below.
The session commits through the journal, keeps the catalogs of tables and vocabularies, and knows about forks.
"""
