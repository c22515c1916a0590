"""Pure computation on arrays and addresses: kernels and how they are compiled, and how a batch is planned and run.

Only this package uses numba and dask. Kernels are compiled around the formulas that they are given, so it contains no
formula of an optimizer or initializer. Nothing in here opens, maps or syncs a file.
"""
