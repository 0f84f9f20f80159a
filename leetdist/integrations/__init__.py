"""Models, data and checkpoints of others, with leetdist's layers and over a group.

A new family of models is a file in models/ of the shape of models/minimax.py, whose handler it gives to registry.py
(docs/extending.md).
"""
