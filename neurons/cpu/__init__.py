"""The event-driven products on processors: loops written as LLVM IR, compiled by numba where they run.

Nothing here is imported before a layer asks for ``backend="numba"``, since numba is optional.
"""
