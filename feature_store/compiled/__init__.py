"""Loops over rows of state, compiled by numba: what NumPy would need a hundred calls for, in one pass (ADR 13).

A function is compiled at its first call; the machine code is kept beside its module, else in the user's cache folder,
else (a read-only disk) nowhere. Of what a function depends on the cache sees its own file only. So a compiled function
calls none outside its file, and whatever is declared elsewhere comes as an argument.

Arithmetic is IEEE, unfused, in written order. Powers and logarithms are left to the callers: stream, refold and every
reader share one implementation of each.
"""
