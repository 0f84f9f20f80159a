"""What a tile does, by which method, and which kernels compute it.

- base: what an operator is. A new one is a class, as constant_decay.py, and a line in registry.py.
- implementations: the kernels that there are, and what each refuses. A new one is an `Implementation`, and a place in
  `CANDIDATES`. dispatch asks them, by their refusals and the facts of a call, has the first that serves compiled
  (rehearsal), and returns a choice; composition makes the kernels of a call's two passes of such choices.
- methods: the ways to compute the constant decay, by name. cost: what "auto" takes.

docs/extending.md walks through both.
"""
