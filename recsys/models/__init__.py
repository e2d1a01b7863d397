"""Models: jagged features, TorchRec embeddings, the user and item towers, the ranker, and deltas to all of them.

Every module here but this one imports torch, so this package exports nothing: workers and training import the module
they need (`recsys.models.tower`, `.ranker`, `.delta`), the gateway imports none.
"""
