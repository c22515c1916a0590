"""The whole life of a store in one program, and the text that it trains on.

Like a user's program, it uses only public names, except for the helpers that format sizes and show progress.
"""
