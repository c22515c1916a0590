"""Keys to rows: checking and hashing keys, the index that finds their rows, and the tables that hold them.

``key_rows.py`` is one vocabulary, ``keyed_rows.py`` a table together with its vocabulary. How rows are stored is the
business of the rooms below.
"""
