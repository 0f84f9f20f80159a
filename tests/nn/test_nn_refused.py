"""What layers refuse: each is a ValueError that names the argument. And what they take for the same as a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import leetdist
from leetdist import nn

Row = tuple[str, Callable[[], Any], str]

LARGE = 1 << 70
KINDS: dict[str, Callable[..., Any]] = {
    "LightningAttention": partial(nn.LightningAttention, dim=32, heads=2),
    "Retention": partial(nn.Retention, dim=32, heads=2),
    "SimpleGLA": partial(nn.SimpleGLA, dim=32, heads=2),
    "Mamba2": partial(nn.Mamba2, dim=32, head_dim=16, state=16),
    "GatedRMSNorm": partial(nn.GatedRMSNorm, width=32, size=16),
}
# Sizes that must be given, and those for which None stands for one that the layer chooses.
SIZES = {
    "LightningAttention": (("dim", "heads"), ("head_dim",)),
    "Retention": (("dim", "heads"), ("value_dim", "key_dim")),
    "SimpleGLA": (("dim", "heads"), ("value_dim",)),
    "Mamba2": (("dim", "head_dim", "state", "groups", "conv"), ("heads",)),
    "GatedRMSNorm": (("width", "size"), ()),
}
FLAGS = {
    "LightningAttention": ("learnable_decay", "exact"),
    "Retention": ("learnable_decay", "rotary", "exact"),
    "SimpleGLA": ("exact",),
    "Mamba2": ("bias", "conv_bias", "exact"),
}
EPS = ("Retention", "Mamba2", "GatedRMSNorm")


def rows() -> Iterator[Row]:
    for kind, make in KINDS.items():
        required, optional = SIZES[kind]
        for name in (*required, *optional):
            for value in (0, -1, 1.5, True, "32", [32], math.nan, LARGE, 1 << 40, torch.tensor(32), torch.ones(2)):
                yield f"{kind} {name} {value!r}", partial(make, **{name: value}), f"^{name} must be"
        for name in required:
            yield f"{kind} {name} None", partial(make, **{name: None}), f"^{name} must be"
        for name in FLAGS.get(kind, ()):
            for value in (None, 1, 0, "yes", [], torch.tensor(True), torch.ones(2)):
                yield f"{kind} {name} {value!r}", partial(make, **{name: value}), f"^{name} must be True or False"
        if kind in EPS:
            for value in (-1e-6, math.nan, math.inf, "1e-6", True, [1e-6]):
                yield f"{kind} eps {value!r}", partial(make, eps=value), "^eps must be"
    for layout in (None, 3, [], {}, ["fla"], np.ones(2), "paper"):
        yield f"layout {layout!r}", partial(KINDS["Retention"], layout=layout), "^layout must be one of leetdist, tor"
    for kind in ("LightningAttention", "Retention"):
        for what, decay in (("meta", torch.ones(2, device="meta")), ("complex", -torch.ones(2, dtype=torch.complex64)),
                            ("sparse", -torch.ones(2).to_sparse())):  # fmt: skip
            yield f"{kind} decay {what}", partial(KINDS[kind], decay=decay), "^decay must be"
    for value in (1e30, 0.0, -2.0, 0.03, math.nan, math.inf):
        yield f"expand {value}", partial(KINDS["Mamba2"], expand=value), "^expand must be"

    x, norm = torch.ones(2, 5, 32), nn.GatedRMSNorm(32, 16)
    for value in (None, 3, [1.0], torch.ones(()), torch.ones(2, 5, 16), torch.ones(5, 32), x.int(), x.to_sparse()):
        what = type(value).__name__ if not isinstance(value, Tensor) else f"{value.layout} {tuple(value.shape)}"
        yield f"norm gate {what}", partial(norm, x, value), "^gate must be"
        if not isinstance(value, Tensor) or value.shape != (5, 32):
            yield f"norm x {what}", partial(norm, value, x), "^x must be"

    for exact in (False, True):
        layer = nn.Retention(32, 2, exact=exact)
        for value in (3, "0", [0, 1, 2, 3, 4], torch.ones(()), torch.arange(4)[None], torch.ones(3, 5), torch.ones(2)):
            yield f"position_ids {value!r}", partial(layer, x, position_ids=value), "^position_ids must be"
    conv, ssm = torch.zeros(2, 3, 64 + 32), torch.zeros(2, 4, 16, 16)
    for exact in (False, True):
        layer = KINDS["Mamba2"](exact=exact)
        for value in (3, "state", object(), (conv,), (conv, ssm, ssm), ssm, {}):
            yield f"Mamba2 state {type(value).__name__}", partial(layer, x, state=value), "^state must be a Mamba2State"
        for value in (3, "x", conv[:1], conv[:, 1:], conv.to_sparse(), conv.numpy()):
            state = nn.Mamba2State(value, ssm)
            yield f"conv {type(value).__name__}", partial(layer, x, state=state), r"^state\.conv must"
    for value in (3, "x", ssm[0], ssm.mT[:, :, 1:], ssm.numpy(), torch.zeros(2)):
        layer, state = KINDS["Mamba2"](), nn.Mamba2State(conv, value)
        for tokens in (x, x[:, :1]):
            run = partial(layer, tokens, state=state, return_state=True)
            yield f"ssm {type(value).__name__} {tokens.shape[1]}", run, r"^state\.ssm must"

    for name in (None, 3, [], object()):
        yield f"ladder {type(name).__name__}", partial(nn.ladder, name), "^name must be a string"
    yield "ladder of none", lambda: nn.ladder("none of these")(3), "^function must be callable"
    yield "log_decay heads", partial(nn.log_decay, "tnl", LARGE), "^heads must be"
    yield "check_decays of nothing", partial(nn.check_decays, {}, "tnl", layers=1), "^model must have decays"
    yield "check_decays of numbers", partial(nn.check_decays, {0: 1.0}, "tnl", layers=1), r"^model\[0\] must be"


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row[0])
def test_is_refused_in_words(row: Row) -> None:
    with pytest.raises(ValueError, match=row[2]):
        row[1]()


@pytest.mark.parametrize("kind", KINDS)
def test_numpys_numbers_are_numbers(kind: str) -> None:
    required, optional = SIZES[kind]
    sizes = {"dim": 32, "heads": 2, "width": 32, "size": 16, "head_dim": 16, "state": 16, "groups": 1, "conv": 4}
    sizes |= {"value_dim": 64, "key_dim": 32}
    if kind == "Mamba2":
        sizes["heads"] = 4
    own = {name: np.int64(sizes[name]) for name in (*required, *optional)}
    layer = KINDS[kind](**own)
    assert not [name for name, value in vars(layer).items() if isinstance(value, np.generic)]
    x = torch.randn(1, 5, 32)
    assert (layer(x, x) if kind == "GatedRMSNorm" else layer(x)).shape == x.shape


def test_layers_of_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.randn(1, 20, 32)
        for kind, make in KINDS.items():
            more = {"learnable_decay": True} if kind in ("LightningAttention", "Retention") else {}
            layer = make(**more)
            y = layer(x, x) if kind == "GatedRMSNorm" else layer(x)
            y.sum().backward()
            assert y.shape == x.shape


def test_a_mamba2_without_a_part_of_its_state() -> None:
    """None stands for zeros in either part, also of one token."""
    layer = KINDS["Mamba2"]()
    x = torch.randn(1, 1, 32)
    y, (conv, ssm) = layer(x, return_state=True)
    for state in ((None, None), (torch.zeros_like(conv), None), (None, torch.zeros_like(ssm))):
        found, _ = layer(x, state=leetdist.nn.Mamba2State(*state), return_state=True)
        torch.testing.assert_close(found, y)


SHARED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    *((name, {}, {"x": torch.zeros(1, 16, 31)}, "x must have shape") for name in ("LightningAttention", "SimpleGLA")),
    ("Mamba2", {}, {"x": torch.zeros(1, 32)}, "x must have shape"),
    ("Retention", {"position_ids": torch.arange(16)}, {"x": torch.zeros(1, 16, 31)}, "x must have shape"),
    ("Mamba2", {}, {"state": torch.zeros(1)}, "state must be a Mamba2State"),
    ("Mamba2", {"exact": True, "return_state": True}, {"cu_seqlens": torch.tensor([0, 32])}, "must be None where"),
    ("SimpleGLA", {"exact": True, "return_state": True}, {"cu_seqlens": torch.tensor([0, 32])}, "must be None where"),
    ("SimpleGLA", {"exact": True, "return_state": True}, {"state": torch.zeros(1, 2, 16, 16)}, "state must be a State"),
    *((name, {}, {"return_state": "yes"}, "return_state must be") for name in ("SimpleGLA", "Mamba2")),
    ("Retention", {"position_ids": torch.arange(16)}, {"position_ids": None}, "position_ids must be given"),
    ("Retention", {"position_ids": torch.arange(16)}, {"position_ids": torch.arange(3)}, "position_ids must be numb"),
]


@pytest.mark.parametrize(("name", "options", "change", "words"), SHARED, ids=[f"{row[0]}, {row[3]}" for row in SHARED])
def test_what_a_layer_refuses_on_one_rank_is_told_to_all(
    name: str, options: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    layer = KINDS[name](tile=16, exact=options.get("exact", False))
    given = {"x": torch.zeros(1, 16, 32)} | {key: x for key, x in options.items() if key != "exact"}

    def rank(group: Any) -> None:
        mine = given | (change if group.rank == 1 else {})
        with leetdist.sequence_parallel(group), torch.no_grad(), pytest.raises(ValueError, match=words):
            layer(**mine)

    leetdist.virtual_ranks(rank, 2)
