"""A decay a head and token: `S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T` (leetdist.linear_attention), as in Mamba-2 and
simple gated linear attention.

Source: Mamba-2, arXiv 2405.21060, section 6; GLA, arXiv 2312.06635, table 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from leetdist.kernels.common.tiles import Tiles
from leetdist.kernels.mamba.pytorch import scan
from leetdist.operators.base import Dtypes, Inputs, Places
from leetdist.operators.layer_steps import kernel
from leetdist.operators.scalar_decay import ScalarDecay

if TYPE_CHECKING:
    from leetdist.operators.problem import Problem


class TokenDecay(ScalarDecay):
    """log_decay: (B, H, N), -inf allowed: the state starts anew. `fold` is told one factor a tile, (B, H, tiles).

    Of a weighted problem there is also weight, (B, heads of v, N) in log_decay's dtype, and v stands for weight * v,
    rounded to its dtype: that is what all is computed of. So whoever has such a product, as Mamba-2 has dt x, does not
    write it to memory.

    Of a skipped one, which is weighted, there is also skip, Mamba-2's D, (H,) or (H, Dv): that times v, before its
    weight, is added to the outputs once they are rounded, and the sum rounded again; of a gated one by whoever takes
    the outputs.

    A problem may ask for `factor_grads`, and a kernel of the backward pass serve that: the gradients are then v's own,
    with what skip v gives it, the weight's and skip's. Else v's is that of the product, and the others are left to the
    caller (`fixed`).
    """

    tokens: tuple[str, ...] = ("q", "k", "v", "log_decay")

    def __init__(self, problem: Problem, tokens: int) -> None:
        super().__init__(problem, tokens)
        if problem.weighted:
            self.tokens, self.fixed = (*self.tokens, "weight"), () if self.kernels.finishes else ("weight", "skip")
        if problem.skipped:
            self.heads, self.gated = ("skip",), problem.gated
            self.by_token = {} if self.fixed else {"skip": "weight"}

    def prepared(self, x: Inputs, *, backward: bool) -> Inputs:
        if "weight" not in x:
            return x
        v = self.kernels.weighted_values[backward](x["v"], x["weight"])
        skips = not self.fixed if backward else self.kernels.skips and not self.gated
        read = {name: y for name, y in x.items() if skips or name != "skip"}
        if v is not None:
            read["v"] = v
            del read["weight"]
        return read

    def finished(self, o: Tensor, x: Inputs) -> Tensor:
        if "skip" not in x or self.kernels.skips or self.gated:
            return o
        add = kernel(scan.scan_outputs, o, o.shape[3])
        y: Tensor = add(o.transpose(1, 2), x["v"].transpose(1, 2), x["skip"], None, spent=True)
        return y.transpose(1, 2)

    def late_gradients(
        self,
        x: Inputs,
        states: Tensor,
        ends: Tensor,
        do: Tensor,
        tiles: Tiles,
        places: Places,
        dtypes: Dtypes,
        *,
        kept: Inputs,
    ) -> dict[str, Tensor]:
        of_tokens = super().late_gradients(x, states, ends, do, tiles, places, dtypes, kept=kept)
        if "log_decay" in places and "log_decay" not in of_tokens:
            place = places["log_decay"]
            of_tokens["log_decay"] = self.decay_gradient(x, states, ends, do, tiles, out=place)
        return of_tokens
