"""Text encoders: what an item is called, as a vector. `base` has the protocol, one file per variant, and the cache.

The words of a title are light; every encoder imports torch, so this package exports nothing.
"""
