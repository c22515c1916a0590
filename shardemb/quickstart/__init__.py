"""The whole life of a store in one program, with the text that it trains on.

Stands on the public names alone, as a user's program does, except for progress bars.
"""
