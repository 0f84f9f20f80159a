"""RetNet's layers as others lay them out: their checkpoints' names, and the parallel form of what they compute."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import leetdist
from leetdist.nn import Retention

TOKENS = 70
SIZES = {"small": (24, 3, 48), "RetNet's heads": (256, 1, 512)}


def turned(x: Tensor, layout: str) -> Tensor:
    """(N, H, D) fp64, rotated by complex numbers: pairs of neighbours, or of the two halves."""
    tokens, _, width = x.shape
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequency = 10000.0 ** -(pairs / (width // 2 - 1) if layout == "torchscale" else 2 * pairs / width)
    order = x.unflatten(-1, (-1, 2)) if layout == "torchscale" else x.unflatten(-1, (2, -1)).mT
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    z = torch.view_as_complex(order.contiguous()) * torch.exp(1j * angle)[:, None]
    return torch.view_as_real(z).flatten(-2)  # the order of a product's terms does not matter


def parallel_form(weights: dict[str, Tensor], x: Tensor, heads: int, layout: str) -> Tensor:
    """RetNet's equations 3 to 8 as a whole matrix of scores, with each layout's own normalisations; (N, dim) fp64."""
    project = lambda name: (x @ weights[name].T).unflatten(-1, (heads, -1))  # noqa: E731
    q, k, v = (project(f"{name}_proj.weight") for name in "qkv")
    q, k = turned(q, layout), turned(k * k.shape[-1] ** -0.5, layout)
    gamma = 1 - 2.0 ** -torch.arange(5, 5 + heads, dtype=torch.float64)
    n = torch.arange(len(x), dtype=torch.float64)
    decay = (gamma[:, None, None] ** (n[:, None] - n).clamp_min(0)).tril()
    if layout == "torchscale":
        decay = decay / decay.sum(-1, keepdim=True).sqrt()
    scores = torch.einsum("nhd,mhd->hnm", q, k) * decay
    if layout == "torchscale":
        scores = scores / scores.sum(-1, keepdim=True).abs().clamp_min(1)
    o = torch.einsum("hnm,mhd->nhd", scores, v)
    o = o / (o.square().mean(-1, keepdim=True) + (1e-6 if layout == "torchscale" else 1e-5)).sqrt()
    if layout == "fla":
        o = o * weights["g_norm_swish_gate.weight"]
    gate = x @ weights["g_proj.weight"].T
    return (gate * gate.sigmoid() * o.flatten(1)) @ weights["o_proj.weight" if layout == "fla" else "out_proj.weight"].T


def checkpoint(layout: str, size: str, scale: float) -> dict[str, Tensor]:
    """Random weights by the names of the layout's own layer; scale 1: as it is initialised."""
    dim, heads, values = SIZES[size]
    shapes = {"q_proj": (dim, dim), "k_proj": (dim, dim), "v_proj": (values, dim), "g_proj": (values, dim)}
    shapes["o_proj" if layout == "fla" else "out_proj"] = (dim, values)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {f"{name}.weight": scale * 0.25 * shape[1] ** -0.5 * normal(*shape) for name, shape in shapes.items()}
    if layout == "fla":
        weights["g_norm_swish_gate.weight"] = 1 + 0.2 * normal(values // heads)
    return weights


def layer_of(layout: str, size: str, weights: dict[str, Tensor]) -> Retention:
    dim, heads, values = SIZES[size]
    layer = Retention(dim, heads, values, layout=layout).double()
    layer.load_state_dict(weights)  # strictly: no name more, and none less
    return layer


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", ["torchscale", "fla"])
def test_layouts_are_their_parallel_form(layout: str, size: str, scale: float) -> None:
    dim, heads, _ = SIZES[size]
    weights = checkpoint(layout, size, scale)
    x = torch.randn(TOKENS, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = layer_of(layout, size, weights)(x[None])[0], parallel_form(weights, x, heads, layout)
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 2e-6, f"{error:.1e}"  # decays are fp32; torchscale's sum of scores meets the norm's eps


def test_what_torchscale_divides_by_counts_at_initial_weights() -> None:
    weights = checkpoint("torchscale", "RetNet's heads", 1.0)
    x = torch.randn(1, TOKENS, 256, dtype=torch.float64)
    plain = Retention(256, 1, 512).double()
    names = {"g_proj.weight": "gate.weight"}
    plain.load_state_dict({names.get(name, name): weight for name, weight in weights.items()})
    with torch.no_grad():
        right = layer_of("torchscale", "RetNet's heads", weights)(x)
        assert float((plain(x) - right).abs().max() / right.abs().max()) > 1e-3


@pytest.mark.parametrize("layout", ["torchscale", "fla"])
def test_layouts_on_ranks_in_pieces_and_packed(layout: str) -> None:
    layer = layer_of(layout, "small", checkpoint(layout, "small", 8.0))
    x, positions = torch.randn(1, 100, 24, dtype=torch.float64), torch.arange(100)[None]
    with torch.no_grad():
        whole = layer(x)

        def rank(group):
            mine = Retention(24, 3, 48, layout=layout, group=group).double()
            mine.load_state_dict(layer.state_dict())
            local = [leetdist.shard_sequence(y, 1, group, tile=16) for y in (x, positions)]
            return mine(local[0], position_ids=local[1])

        torch.testing.assert_close(torch.cat(leetdist.virtual_ranks(rank, 3), 1), whole)
        y, state = layer(x[:, :60], return_state=True)
        more, state = layer(x[:, 60:99], position_ids=positions[:, 60:99], state=state, return_state=True)
        last, _ = layer(x[:, 99:], position_ids=positions[:, 99:], state=state, return_state=True)
        torch.testing.assert_close(torch.cat([y, more, last], 1), whole)
        places = torch.cat([positions[:, :60], positions[:, :40]], 1)
        packed = layer(x, position_ids=places, cu_seqlens=torch.tensor([0, 60, 100]))
        torch.testing.assert_close(packed, torch.cat([layer(x[:, :60]), layer(x[:, 60:])], 1))
        if layout == "torchscale":
            with pytest.raises(ValueError, match="position_ids must be given"):
                layer(x[:, 60:], state=state)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("layout", ["leetdist", "torchscale", "fla"])
def test_packed_documents_have_positions_of_their_own(layout: str, rotary: bool) -> None:
    """Each document has its bits alone. (A large eps, which tells what the norm would undo.)"""
    layer = Retention(32, 2, layout=layout, rotary=rotary, eps=1.0)
    x, bounds = torch.randn(1, 40, 32), (0, 0, 5, 21, 21, 40)
    packed = layer(x, cu_seqlens=torch.tensor(bounds))
    alone = [layer(x[:, begin:end]) for begin, end in pairwise(bounds) if begin < end]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        layer(x, cu_seqlens=torch.tensor([0, 39]))


def test_a_wider_key_and_an_unknown_layout() -> None:
    assert Retention(32, 4, key_dim=64, layout="fla").head_dim == 16
    with pytest.raises(ValueError, match="layout must be one of leetdist, torchscale, fla, got 'paper'"):
        Retention(32, 4, layout="paper")
