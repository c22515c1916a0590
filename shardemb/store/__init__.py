"""What users hold: `Store`, `Table`, `KeyedTable` and `Vocabulary`.

They are facades: each method is a contract and one call down, to a `Session` (one opening of a store) or to the folders
below.
"""
