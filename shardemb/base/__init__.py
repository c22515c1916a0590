"""Helpers for every other package: validation of input, JSON of dataclasses, progress, signals, sizes, text for people.

Also the numerics of random initial values, which are plain functions of numbers. Nothing here knows what a table or a
store is, and nothing touches a file. A helper that only one package needs belongs in that package.
"""
