"""What a tile does, by which method, and which kernels compute it.

- base: what an operator is. scalar_decay, with constant_decay and token_decay on it, is ours; a new one is a class, and
  a line in registry.
- problem: a call without its data. facts: what of it, and of the machine, decides on kernels.
- implementations: the kernels that there are. refusals: what each cannot serve. A new one is an `Implementation`, and a
  place in `CANDIDATES`.
- dispatch: asks them, has the first that serves compiled (rehearsal), and returns a choice (choice). words: choices as
  `explain` and `doctor` say them.
- composition: the kernels of a call's two passes, made of choices. opened: those of a tile that is not full yet.
  layer_steps: those of what layers do around their attention.
- methods: the ways to compute a decay, by name. cost: what "auto" takes.

docs/extending.md walks through an operator and a kernel.
"""
