"""What every room uses: checking and coercing user input, JSON of dataclasses, progress, signals, sizes, text for people.

Also the numerics of random initial values, which are plain functions of numbers. Nothing here knows what a table or a
store is, and nothing touches a file. What one room alone needs belongs in that room.
"""
