"""The map: one situation a row, as users have them, and how far from its floor each is.

All are bf16 with 32 heads of 128 and 131,072 tokens in (B, H, N, D), unless the name says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from common.cases import Case

PLAIN = Case(1, 131072, layout="heads first")
SHORT = replace(PLAIN, tokens=32768)


def heads_of(dk: int, dv: int | None = None, *, heads: int = 32, dtype: str = "bf16") -> Case:
    return replace(PLAIN, heads=heads, dk=dk, dv=dv or dk, dtype=dtype)


SUITE = (
    "the situations that users have: layouts, documents, grouped heads, head sizes, short calls, dtypes",
    [
        PLAIN,
        replace(PLAIN, layout="tokens first"),
        replace(PLAIN, layout="fused"),
        *(replace(PLAIN, documents=many) for many in (64, 1000, 5000)),
        *(replace(PLAIN, kv_heads=heads) for heads in (8, 1)),
        replace(PLAIN, learnt=True),
        replace(PLAIN, decay="token"),
        replace(PLAIN, decay="token", documents=1000),
        replace(PLAIN, states=True),
        *(replace(PLAIN, batch=batch, tokens=tokens) for batch, tokens in ((8, 4096), (32, 1024), (256, 128), (64, 1))),
        *(replace(PLAIN, heads=heads, tokens=2**20 // heads) for heads in (1, 2)),
        replace(PLAIN, tokens=4096),
        replace(PLAIN, tokens=4096, compiled=True),
        replace(PLAIN, compiled=True),
        heads_of(32, heads=64),
        heads_of(48),
        heads_of(64, heads=64),
        *(heads_of(size) for size in (80, 96, 112)),
        *(heads_of(size, heads=16) for size in (160, 192, 256)),
        heads_of(64, 128),
        replace(SHORT, heads=8, dk=256, dv=512),
        replace(SHORT, heads=8, dk=512, dv=512),
        *(heads_of(size, dtype="fp32") for size in (64, 128)),
        heads_of(192, 128, dtype="fp32"),
        heads_of(256, heads=16, dtype="fp32"),
        replace(PLAIN, options=(("precision", "high"),)),
        replace(PLAIN, options=(("tile", 1024),)),
        replace(PLAIN, decay="none"),
        replace(PLAIN, decay="none", dtype="fp16"),
        *(replace(SHORT, options=(("method", method),)) for method in ("fleet", "lightning")),
    ],
)
