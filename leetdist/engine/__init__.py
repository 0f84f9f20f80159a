"""The engine: tiles, lanes, the order of the fold over ranks, the two passes and their autograd; it knows no operator's
algebra, which is in leetdist.operators.

- call: one call, from arguments to results. repeats: one that is known by a look at its arguments. autograd: its
  gradients. ops, transforms, pending: the same for torch.compile and torch.func, as custom ops.
- inputs, layout, values, checks, hints: arguments in one form, what the host knows of their values, and what is wrong.
- planning: a plan that is known, or made and agreed on by the ranks. plan, lanes: what is in one.
- passes: the forward and the backward pass. gradients: what the second puts together. scan: states between tiles and
  ranks. side: the stream that scans have beside the rest. filling: results that lanes fill. trace: what each rank did
  when.
"""
