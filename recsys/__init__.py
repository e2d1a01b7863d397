"""double11's recommender: the request path, training, replay and the tools around them.

The rooms and what may import what are in docs/architecture.md; `make check` enforces it.
"""
