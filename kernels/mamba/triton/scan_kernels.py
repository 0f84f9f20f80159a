"""The kernels of leetdist.kernels.mamba.triton.scan, which launches them."""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ["tokens"]


@triton.jit
def _place(tokens, heads, TOKENS: tl.constexpr):
    """Batch entry, head and first token of a program."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, TOKENS)
    return program // heads // blocks, program % heads, program // heads % blocks * TOKENS


@triton.jit
def _exp_of_negative(x):
    """exp(x) of fp32 x <= 0 to the last bits, where tl.exp is off by 1e-6 of large ones. Below e^-87 it stays there.

    x = n log(2) + rest, where n times the first of the two parts of log(2) is exact, as in Cody and Waite's Software
    Manual for the Elementary Functions (1980), chapter 6."""
    x = tl.where(x < -87.0, -87.0, x)  # where, so that NaN stays
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp(rest) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    """log(1 + e^x) and its derivative, of fp32."""
    u = _exp_of_negative(-tl.abs(x))
    rounded = 1.0 + u
    lost = rounded == 1.0
    log1p = tl.where(lost, u, tl.log(rounded) * (u / tl.where(lost, 1.0, rounded - 1.0)))
    return tl.where(x > 0.0, x, 0.0 * x) + log1p, tl.where(x > 0.0, 1.0, u) / rounded


@triton.jit
def _steps(dt, bias, least, most, SOFTPLUS: tl.constexpr):
    """Of dt as it is given: after bias, softplus and limits, and the derivative by it."""
    soft = dt.to(tl.float32) + bias
    slope = tl.zeros_like(soft) + 1.0
    if SOFTPLUS:
        soft, slope = _softplus(soft)
    own = tl.where(soft < least, least, soft)  # where, so that NaN stays
    slope = tl.where((soft >= least) & (soft <= most), slope, 0.0)
    return tl.where(own > most, most, own), slope


@triton.jit
def _silu(x):
    """x sigmoid(x), and sigmoid(x)."""
    s = 1.0 / (1.0 + tl.exp(-x))
    return x * s, s


@triton.jit
def _turn(tokens, heads, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Batch entry, block of tokens, tokens and heads of a program that looks at dt."""
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(tokens, TOKENS)
    parts = tl.cdiv(heads, HEADS)
    block = program // parts % blocks
    i = block * TOKENS + tl.arange(0, TOKENS)[:, None]
    return program // parts // blocks, block, i, program % parts * HEADS + tl.arange(0, HEADS)[None, :]


@triton.jit
def _given_steps(dt, bias, place, h, heads, inside, least, most, SOFTPLUS: tl.constexpr):
    """See _steps; of what is loaded."""
    added = 0.0
    if bias is not None:
        added = tl.load(bias + h, mask=h < heads, other=0.0)
    return _steps(tl.load(dt + place, mask=inside, other=0.0), added, least, most, SOFTPLUS)


@triton.jit(do_not_specialize=COUNTS)
def steps_kernel(
    dt, a, bias, starts, own, log_decay, dt_batch, dt_token, dt_head, least, most, tokens, heads,
    SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    batch, _block, i, h = _turn(tokens, heads, TOKENS, HEADS)
    inside = (i < tokens) & (h < heads)
    place = batch * dt_batch + i * dt_token + h * dt_head
    steps, _slope = _given_steps(dt, bias, place, h, heads, inside, least, most, SOFTPLUS)
    g = steps * tl.load(a + h, mask=h < heads, other=0.0)
    if starts is not None:
        g = tl.where(tl.load(starts + batch * tokens + i, mask=i < tokens, other=0) != 0, float("-inf"), g)
    place = (batch * heads + h) * tokens + i
    tl.store(own + place, steps, mask=inside)
    tl.store(log_decay + place, g, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def steps_gradient_kernel(
    dt, a, bias, starts, grown, dlog_decay, ddt, da, dbias,
    dt_batch, dt_token, dt_head, g_batch, g_head, g_token, least, most, tokens, heads,
    SOFTPLUS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """grown: what dt gets by dt x, (B, H, N)."""
    batch, block, i, h = _turn(tokens, heads, TOKENS, HEADS)
    inside = (i < tokens) & (h < heads)
    place = batch * dt_batch + i * dt_token + h * dt_head
    steps, slope = _given_steps(dt, bias, place, h, heads, inside, least, most, SOFTPLUS)
    g = tl.load(dlog_decay + batch * g_batch + h * g_head + i * g_token, mask=inside, other=0.0)
    if starts is not None:
        g = tl.where(tl.load(starts + batch * tokens + i, mask=i < tokens, other=0) != 0, 0.0, g)
    part = (batch * tl.cdiv(tokens, TOKENS) + block) * heads + h
    if da is not None:
        tl.store(da + part, tl.sum(tl.where(inside, g * steps, 0.0), 0)[None, :], mask=h < heads)
    if grown is not None:
        total = tl.load(grown + (batch * heads + h) * tokens + i, mask=inside, other=0.0)
        total = (total + g * tl.load(a + h, mask=h < heads, other=0.0)) * slope
        if ddt is not None:
            tl.store(ddt + (batch * tokens + i) * heads + h, total.to(ddt.dtype.element_ty), mask=inside)
        if dbias is not None:
            tl.store(dbias + part, tl.sum(tl.where(inside, total, 0.0), 0)[None, :], mask=h < heads)


@triton.jit(do_not_specialize=COUNTS)
def products_gradient_kernel(
    x, own, skip, dv, dskip, dx, grown, dd,
    x_batch, x_token, x_head, x_column, dv_batch, dv_token, dv_head, dv_column,
    dskip_batch, dskip_token, dskip_head, dskip_column, tokens, heads, width, segments,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT_: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(tokens, heads, SEGMENT_)
    segment = first // SEGMENT_
    j = tl.arange(0, COLUMNS)
    x += batch * x_batch + head * x_head + j[None, :] * x_column
    dv += batch * dv_batch + head * dv_head + j[None, :] * dv_column
    row = (batch * heads + head) * tokens
    if dskip is not None:
        dskip += batch * dskip_batch + head * dskip_head + j[None, :] * dskip_column
        if WIDE:
            factor = tl.load(skip + head * width + j, mask=j < width, other=0.0)[None, :]
        else:
            factor = tl.load(skip + head)
    sum_d = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for offset in range(0, SEGMENT_, TOKENS):
        i = first + offset + tl.arange(0, TOKENS)
        there = i < tokens
        inside = there[:, None] & (j < width)[None, :]
        values = tl.load(x + i[:, None] * x_token, mask=inside, other=0.0).to(tl.float32)
        of_v = tl.load(dv + i[:, None] * dv_token, mask=inside, other=0.0).to(tl.float32)
        if grown is not None:
            tl.store(grown + row + i, tl.sum(of_v * values, 1), mask=there)
        of_x = of_v * tl.load(own + row + i, mask=there, other=0.0)[:, None]
        if dskip is not None:
            of_skip = tl.load(dskip + i[:, None] * dskip_token, mask=inside, other=0.0).to(tl.float32)
            of_x += of_skip * factor
            if dd is not None:
                sum_d += of_skip * values
        if dx is not None:
            place = dx + ((batch * tokens + i[:, None]) * heads + head) * width + j[None, :]
            tl.store(place, of_x.to(dx.dtype.element_ty), mask=inside)
    if dd is not None:
        part, of_columns = (batch * segments + segment) * heads + head, tl.sum(sum_d, 0)
        if WIDE:
            tl.store(dd + part * width + j, of_columns, mask=j < width)
        else:
            tl.store(dd + part, tl.sum(of_columns, 0))


@triton.jit(do_not_specialize=COUNTS)
def outputs_kernel(
    dy, o, x, skip, z, y, dz,
    o_batch, o_token, o_head, o_column, dy_batch, dy_token, dy_head, dy_column,
    x_batch, x_token, x_head, x_column, z_batch, z_token, z_head, z_column, tokens, heads, width,
    WIDE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    batch, head, first = _place(tokens, heads, TOKENS)
    i, j = (first + tl.arange(0, TOKENS))[:, None], tl.arange(0, COLUMNS)[None, :]
    inside = (i < tokens) & (j < width)
    place = batch * o_batch + i * o_token + head * o_head + j * o_column
    total = tl.load(o + place, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        place = batch * x_batch + i * x_token + head * x_head + j * x_column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if WIDE:
            total += values * tl.load(skip + head * width + j, mask=j < width, other=0.0)
        else:
            total += values * tl.load(skip + head)
    out = ((batch * tokens + i) * heads + head) * width + j
    if z is not None:
        place = batch * z_batch + i * z_token + head * z_head + j * z_column
        gate = tl.load(z + place, mask=inside, other=0.0).to(tl.float32)
        opened, s = _silu(gate)
        if dy is not None:
            place = batch * dy_batch + i * dy_token + head * dy_head + j * dy_column
            grown = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
            of_gate = grown * total * (s * (1.0 + gate * (1.0 - s)))
            tl.store(dz + out, of_gate.to(dz.dtype.element_ty), mask=inside)
            total = grown * opened
        else:
            total *= opened
    tl.store(y + out, total.to(y.dtype.element_ty), mask=inside)
