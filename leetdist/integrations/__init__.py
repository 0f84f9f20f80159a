"""Models, data and checkpoints of others, with leetdist's layers and over a group.

- parallelize: walks a model. registry: its handlers, one a class of layers. probe: which layers without one mix tokens.
  record: what was done to a model, so that it can be undone.
- transformers: what is done to its models. models: a file a family; ssd: what those with Mamba-2's layers share;
  softmax: attention over ranks; lightning: layers of remote code; options: what models hand to all layers. A new family
  is a file of the shape of models/minimax.py, whose handler it gives to registry (docs/extending.md).
- calls: around each call of such a model. caches, minimax_cache: what it generates with. documents: how it tells of
  packed ones. model_loss: the loss that it returns.
- batches, loader: data. loss: the mean over all ranks. trainer: transformers' Trainer. checkpoint, pickles: saving, and
  what may be loaded.
"""
