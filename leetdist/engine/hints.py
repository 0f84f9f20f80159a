"""Words for the mistake that most people make first: q, k and v as (B, N, H, D), which the shapes alone may allow."""

from __future__ import annotations

from torch import Tensor

from leetdist.sequence.site import warn

# More heads than any model has, none of which has a decay of its own, and next to no tokens.
MANY_HEADS, TOKENS_A_HEAD = 512, 1 / 8


def layout_hint(q: Tensor) -> str:
    """The end of an error about shapes that (B, N, H, D) would explain."""
    return f"; q looks like (B, N, H, D), {tuple(q.shape)}, and must be (B, H, N, D): pass q.transpose(1, 2)"


def more_heads_than_tokens(q: Tensor) -> bool:
    """Whether an error about shapes may well come from (B, N, H, D); one token is a step of decoding."""
    return bool(q.shape[1] > q.shape[2] > 1)


def warn_of_layout(q: Tensor, log_decay: Tensor | None) -> None:
    """Where everything fits, and yet it is all but certain. A decay a head says that the heads are meant; one a token,
    (B, N, H) then, does not."""
    heads, tokens = q.shape[1:3]
    if (log_decay is None or log_decay.ndim > 1) and heads >= MANY_HEADS and 1 < tokens <= TOKENS_A_HEAD * heads:
        warn(
            f"leetdist: {heads} heads of {tokens} tokens and no decay a head{layout_hint(q)}. Where so many are "
            "meant, a log_decay a head, which may be zeros, says so"
        )


__all__ = ["layout_hint", "more_heads_than_tokens", "warn_of_layout"]
