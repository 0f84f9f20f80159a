"""NaNs and infinities in the kernels of outputs for Hopper: a second walk of the tiles that hold some. In Gluon.

A NaN or an infinity of a later token must not reach an earlier output, but a score of 0 times it is NaN. Whatever of b,
c and the states is not finite is in a tile's last state too, so a program looks there, and says in `again` what it has
found. The same kernel, compiled with AGAIN, follows, and returns at once where nothing was found. Where something was,
it walks the tile again with 0 in its place, and puts NaN into the outputs that see it, from its token on in the order
of the walk: into all columns for a row of b, into its own column for a number of c or of the state. All other outputs
get the same products in the same order. It is a compilation of its own because ptxas, given both walks, spills in the
first.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

INFINITY = gl.constexpr(float("inf"))


@gluon.constexpr_function
def _whole_columns(bits, num_warps):
    """16 bytes a thread, whole columns a warp: to look along them takes no shared memory, of which there is none."""
    return gl.BlockedLayout([1, 128 // bits], [32, 1], [1, num_warps], [1, 0])


@gluon.jit
def not_finite(x):
    return (gl.abs(x.to(gl.float32)) < INFINITY) == 0


@gluon.jit
def say(again, state):
    """Whether there is something in a tile's last state that is not finite."""
    gl.store(again, gl.max(gl.max(not_finite(state).to(gl.int32), 1), 0))


@gluon.jit
def lost_before(states, row, column, rows, columns, first, CHUNK: gl.constexpr, STATE: gl.constexpr,
                 WIDE: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """(columns,): 0 where the state at a tile's start is not finite, else CHUNK."""
    LOOK: gl.constexpr = _whole_columns(32, num_warps)
    i = gl.arange(0, STATE[0], gl.SliceLayout(1, LOOK))[:, None]
    j = first + gl.arange(0, STATE[1], gl.SliceLayout(0, LOOK))[None, :]
    state = gl.load(states + i * row + j * column, mask=(i < rows) & (j < columns), other=0.0)
    lost = gl.where(gl.max(not_finite(state).to(gl.int32), 0) > 0, 0, CHUNK)
    return gl.convert_layout(lost, gl.SliceLayout(0, WIDE))


@gluon.jit
def _walked(CHUNK: gl.constexpr, REVERSE: gl.constexpr, LAYOUT: gl.constexpr):
    """(CHUNK, 1): the place of each token in the order of the walk."""
    token = gl.arange(0, CHUNK, gl.SliceLayout(1, LAYOUT))[:, None]
    return CHUNK - 1 - token if REVERSE else token


@gluon.jit
def clean(b, c, lost, REVERSE: gl.constexpr, ROWS: gl.constexpr, WIDE: gl.constexpr, num_warps: gl.constexpr):
    """Put 0 for what is not finite in a chunk of b and c. (columns,): the place from which on each column is lost, the
    chunk's length where it is not; `lost`: what was before. ROWS: a layout of b with whole rows a warp."""
    CHUNK: gl.constexpr = c.shape[0]
    LOOK: gl.constexpr = _whole_columns(c.dtype.primitive_bitwidth, num_warps)
    b_values = b.load(ROWS)
    bad = not_finite(b_values)
    b.store(gl.where(bad, gl.zeros_like(b_values), b_values))
    bad_rows = gl.convert_layout(gl.max(bad.to(gl.int32), 1), gl.SliceLayout(1, LOOK))[:, None] > 0
    c_values = c.load(LOOK)
    bad = not_finite(c_values)
    c.store(gl.where(bad, gl.zeros_like(c_values), c_values))
    places = gl.where(bad | bad_rows, _walked(CHUNK, REVERSE, LOOK), CHUNK)
    return gl.minimum(lost, gl.convert_layout(gl.min(places, 0), gl.SliceLayout(0, WIDE)))


@gluon.jit
def mark(o, lost, REVERSE: gl.constexpr, WIDE: gl.constexpr):
    """NaN for a chunk's outputs that are lost; and what is lost from the chunk's end on."""
    CHUNK: gl.constexpr = o.shape[0]
    o = gl.where(_walked(CHUNK, REVERSE, WIDE) >= lost[None, :], float("nan"), o)
    return o, gl.where(lost < CHUNK, 0, CHUNK)
