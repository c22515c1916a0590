"""From keys to rows: checking and hashing keys, the index that finds their rows, and the tables that hold them.

``key_rows.py`` has one vocabulary, ``keyed_rows.py`` a table together with its vocabulary. How rows are stored is the
business of the packages below.
"""
