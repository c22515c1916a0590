"""What users hold, and what makes it durable.

`Store`, `Table`, `KeyedTable` and `Vocabulary` are facades: each method is a contract and one call down, to a `Session`
(one opening of a store) or to the folders below. The session commits through the journal, keeps the catalogs of tables
and vocabularies, and handles forks.
"""
