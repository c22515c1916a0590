"""Pure work on arrays and addresses: kernels, how they are compiled, how a batch is planned and run on threads.

The one room of numba and of dask. Kernels are compiled around the formulas that they are given, so no formula of an
optimizer or initializer stands here; and nothing opens, maps or syncs a file.
"""
