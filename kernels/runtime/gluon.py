"""Gluon's language by one name in all releases of Triton: kernels take from here what has changed its name.

Chosen by what a release has, not by its number. Nothing here changes what a kernel computes.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Waits for all threads of a program.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# A bulk copy from global to shared memory. The old name may remain, as one that refuses.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
# reinterpret(memory, dtype, shape, layout): shared memory seen as something else of as many bytes.
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret
