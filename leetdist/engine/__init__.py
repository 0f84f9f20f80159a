"""The engine: tiles, lanes, the order of the fold over ranks, the two passes and their autograd; it knows no operator's
algebra, which is in leetdist.operators.

A call goes from call.py (or, traced and compiled, ops.py) through planning.py (with checks.py, which makes a
problem of it, and plan.py), passes.py and scan.py.
"""
