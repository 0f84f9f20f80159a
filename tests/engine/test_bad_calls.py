"""Calls that mean nothing, a few hundred of them: each is a ValueError that names the argument."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import leetdist

Row = tuple[str, Callable[[], Any], str]

B, H, N, D = 1, 2, 40, 16
INF, NAN = math.inf, math.nan


class Wrapper(Tensor):
    """A subclass whose operations are its own: what it holds in memory means nothing."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("nobody computes with it")


def wrapped(x: Tensor) -> Tensor:
    return Tensor._make_wrapper_subclass(Wrapper, x.shape, dtype=x.dtype, device=x.device)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def valid(**changes: Any) -> dict[str, Any]:
    return {name: tensor(B, H, N, D) for name in "qkv"} | {"log_decay": -tensor(H)} | changes


# What is no dense tensor of real numbers, whatever its shape; of the shape that is right where it can be.
def no_tensors(x: Tensor) -> Iterator[tuple[str, Any]]:
    yield "list", x.tolist()
    yield "array", x.numpy()
    yield "string", "tensor"
    yield "number", 1.0
    yield "bool", True
    yield "sparse", x.to_sparse()
    yield "complex", x.to(torch.complex64)
    yield "int", x.int()
    yield "bools", x.bool()
    yield "fp8", x.to(torch.float8_e4m3fn)
    yield "wrapper", wrapped(x)
    yield "lazy", nn.UninitializedParameter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield "quantized", torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
        yield "nested", torch.nested.nested_tensor([x[0], x[0]] if x.ndim > 1 else [x, x])
        yield "jagged", torch.nested.nested_tensor([x[0], x[0]] if x.ndim > 1 else [x, x], layout=torch.jagged)
        if x.ndim == 2:
            yield "csr", x.to_sparse_csr()
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and x.ndim in (1, 4):
        yield "mkldnn", x.to_mkldnn()


class Anything:
    """No argument of any kind; its name is the same in every process that collects the tests."""

    def __repr__(self) -> str:
        return "anything"


FLAGS: list[Any] = ["no", "yes", 1, 0, None, [], torch.tensor(True), 1.0]
GROUPS: list[Any] = [3, "world", [0, 1], Anything(), True, torch.zeros(2)]
LARGE = 1 << 40


def attention_rows(name: str, function: Callable[..., Any]) -> Iterator[Row]:
    """Of a function with the arguments of `linear_attention`."""

    def bad(argument: str, what: str, value: Any, words: str = "") -> Row:
        changes = value if isinstance(value, dict) else {argument: value}
        return f"{name} {argument} {what}", lambda: function(**valid(**changes)), words or rf"\b{argument}\b"

    for argument in "qkv":
        for what, x in no_tensors(tensor(B, H, N, D)):
            yield bad(argument, what, x)
        for shape in [(), (N,), (H, N, D), (B, H, 1, N, D), (0, H, N, D), (B, 0, N, D), (B, H, N, 0)]:
            yield bad(argument, f"of shape {shape}", tensor(*shape))
        yield bad(argument, "None", None)
        yield bad(argument, "on meta", tensor(B, H, N, D, device="meta"), r"\b(q|k|v)\b")
        yield bad(argument, "another dtype", tensor(B, H, N, D).bfloat16(), r"\b(q|k|v)\b.* dtype")
        yield bad(argument, "longer", tensor(B, H, N + 1, D), r"\b(q|k|v)\b.* N = ")
        yield bad(argument, "of a larger batch", tensor(B + 1, H, N, D), r"\b(q|k|v)\b.* B = ")
    yield bad("k", "another Dk", tensor(B, H, N, D + 1), "head dimension Dk = 16")
    yield bad("k", "3 heads", tensor(B, 3, N, D), "number of heads")
    yield bad("v", "3 heads", tensor(B, 3, N, D), "divides v's 3, got 2")
    yield bad("q", "no tokens", {n: tensor(B, H, 0, D) for n in "qkv"}, "q: N is 0")

    for what, x in no_tensors(-tensor(H)):
        yield bad("log_decay", what, x)
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        yield bad("log_decay", str(dtype), -tensor(H).to(dtype), "log_decay must be float32")
    for shape in [(), (0,), (1,), (H + 1,), (H, 1), (1, H), (B, H, N, 1)]:
        yield bad("log_decay", f"of shape {shape}", -tensor(*shape))
    for value in (NAN, INF, 1e-38, 1.0):
        for head in range(H):
            x = -tensor(H)
            x[head] = value
            yield bad("log_decay", f"{value} for head {head}", x, f"log_decay must be <= 0 .*for head {head}")
    yield bad("log_decay", "on meta", -tensor(H, device="meta"), "log_decay must be on q's device")
    every = -tensor(B, H, N)
    for what, x in no_tensors(every):
        yield bad("log_decay", f"a token {what}", x)
    for dtype in (torch.float16, torch.bfloat16, torch.int64):
        yield bad("log_decay", f"a token {dtype}", every.to(dtype), "log_decay must be float32")
    for shape in [(B, H, N + 1), (B, 1, N), (B + 1, H, N), (H, N), (B, N, H + 1), (B, 0, N)]:
        yield bad("log_decay", f"a token of shape {shape}", -tensor(*shape), r"or \(B, H, N\) = \(1, 2, 40\)")
    yield bad("log_decay", "a token, transposed", every.mT, r"pass log_decay\.transpose\(1, 2\)")
    yield bad("log_decay", "a token on meta", every.to("meta"), "log_decay must be on q's device")
    for value in (NAN, INF, 1e-38):
        x = every.clone()
        x[0, 1, 17] = value
        yield bad("log_decay", f"{value} at token 17", x, "log_decay must be <= 0 .*for head 1 at token 17$")
    two = {n: tensor(2, H, N, D) for n in "qkv"} | {"log_decay": torch.stack([every[0], x[0]])}
    yield bad("log_decay", "positive in the second row", two, "head 1 at token 17 of batch entry 1")
    model = {n: tensor(B, N, H, D) for n in "qkv"}
    yield bad("log_decay", "of (B, N, H, D)", model, r"log_decay .*q looks like \(B, N, H, D\)")

    for value in (NAN, INF, -INF, 1e300, -1e39, 10**400, True, False, np.bool_(True), "1", None, [1.0], 1j):
        yield bad("scale", str(value)[:8], value)
    yield bad("scale", "a tensor", torch.tensor(1.0), "scale .*item")
    for value in (16.0, "16", 0, -16, 8, 15, 48, True, LARGE, [16], (16,), np.float64(16), torch.tensor(16), 1.5):
        yield bad("tile", f"{type(value).__name__} {value}", value)
    for value in (None, 3, True, "", "Block", "quadratic", b"block", ["block"], ("block",), {"block"}, np.ones(2)):
        yield bad("method", f"{type(value).__name__} {value}", value)
    for value in ("fp32", "TF32", "", 32, True, torch.float32, ["high"], {"high"}, tensor(2)):
        yield bad("precision", f"{type(value).__name__} {value}", value)
    yield bad("precision", "tf32 of fp64", {n: tensor(B, H, N, D).double() for n in "qkv"} | {"precision": "tf32"})
    for value in FLAGS:
        yield bad("return_state", repr(value), value)
    for value in GROUPS:
        yield bad("group", type(value).__name__, value)

    for what, x in no_tensors(tensor(B, H, D, D)):
        yield bad("initial_state", what, x)
    for shape in [(), (H, D, D), (B + 1, H, D, D), (B, 1, D, D), (B, H, D, D - 1), (B, H, 1, D, D)]:
        yield bad(
            "initial_state", f"of shape {shape}", tensor(*shape).requires_grad_(), "initial_state must have shape"
        )
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield bad("initial_state", str(dtype), tensor(B, H, D, D, dtype=dtype), "initial_state must be torch.float32")
    yield bad("initial_state", "on meta", tensor(B, H, D, D, device="meta"), "initial_state must be on q's device")

    bounds = torch.tensor([0, 7, N])
    for what, x in [("sparse", bounds.to_sparse()), ("list", [0, 7, N]), ("array", bounds.numpy()), ("number", N),
                    ("wrapper", wrapped(bounds)), ("string", "0")]:  # fmt: skip
        yield bad("cu_seqlens", what, x)
    for dtype in (torch.float32, torch.int16, torch.uint8, torch.bool, torch.float64):
        yield bad("cu_seqlens", str(dtype), bounds.to(dtype), "cu_seqlens must be int32 or int64")
    for values in (
        [1, N],
        [0, N - 1],
        [0, N + 1],
        [0, 20, 10, N],
        [-1, N],
        [0, -1, N],
        [0],
        [],
        [[0, N]],
        N,
        [0, LARGE],
    ):
        yield bad("cu_seqlens", str(values), torch.tensor(values, dtype=torch.int64))
    yield bad("cu_seqlens", "on meta", bounds.to("meta"))
    two = {n: tensor(2, H, N, D) for n in "qkv"} | {"cu_seqlens": bounds}
    yield bad("cu_seqlens", "of two rows", two, "cu_seqlens.* B must be 1")


def decoder_rows() -> Iterator[Row]:
    def bad(what: str, words: str, **changes: Any) -> Row:
        given = {n: tensor(B, H, N, D) for n in "qkv"} | changes
        return f"decoder {what}", lambda: leetdist.causal_linear_decoder(**given), words

    gamma = 0.5 * tensor(H)
    for what, x in no_tensors(gamma):
        if what != "fp8":  # any floating dtype
            yield bad(f"gamma {what}", "gamma", gamma=x, is_mask_weight=True)
    yield bad("gamma None", "gamma", is_mask_weight=True)
    yield bad("gamma unasked", "is_mask_weight", gamma=gamma)
    for shape in [(), (1,), (H + 1,), (H, 1)]:
        yield bad(f"gamma {shape}", "gamma must be", gamma=tensor(*shape), is_mask_weight=True)
    for value in (-1.0, NAN, -INF):
        yield bad(f"gamma {value}", "gamma must be at least 0", gamma=gamma * value, is_mask_weight=True)
    for value in (-1.0, 3.0, NAN, INF):
        yield bad(f"decay {value}", "from 0 to 1", gamma=gamma * value, is_mask_weight=True, is_need_exp=False)
    yield bad("gamma on meta", "gamma must be on", gamma=gamma.to("meta"), is_mask_weight=True)
    for value in FLAGS:
        if value is not None:
            yield bad(f"is_mask_weight {value!r}", "is_mask_weight", is_mask_weight=value, gamma=gamma)
        yield bad(f"is_need_exp {value!r}", "is_need_exp", is_need_exp=value, gamma=gamma, is_mask_weight=True)
    for value in ("block", "lightning", "", 3, ["vanilla"], {}, True, tensor(1)):
        yield bad(f"attn_method {value!r}", "attn_method must be one of", attn_method=value)
    for argument in "qkv":
        for what, x in no_tensors(tensor(B, H, N, D)):
            yield bad(f"{argument} {what}", rf"\b{argument}\b", **{argument: x})


def sequence_rows() -> Iterator[Row]:
    x = tensor(3, 40)
    for function in (leetdist.shard_sequence, leetdist.gather_sequence):
        name, argument = function.__name__, "x" if function is leetdist.shard_sequence else "x_local"
        for dim in (2, -3, 10**9, "1", 1.0, None, True, [1], torch.tensor(1.0)):
            yield f"{name} dim {dim!r}", lambda f=function, d=dim: f(x, d, None), "dim"
        for what, y in no_tensors(x):
            if what not in ("complex", "int", "bools", "fp8", "quantized"):  # any dtype
                yield f"{name} {what}", lambda f=function, y=y: f(y, 0, None), argument
        for group in GROUPS:
            yield f"{name} group {group!r}", lambda f=function, g=group: f(x, 0, g), "group must be"
        yield f"{name} number", lambda f=function: f(tensor(), 0, None), "dim must be in"
    for tile in (0, -1, 16.0, "16", True, [16]):
        yield f"shard_sequence tile {tile!r}", lambda t=tile: leetdist.shard_sequence(x, 0, None, tile=t), "tile"
    for ranks in (0, -1, 1.0, "2", None, True, [2], 10**6, 1 << 70):
        yield f"virtual_ranks {ranks!r}", lambda r=ranks: leetdist.virtual_ranks(lambda group: 0, r), "ranks"
    yield "virtual_ranks function", lambda: leetdist.virtual_ranks(3, 2), "function must be callable"  # type: ignore[arg-type]

    def scope(**options: Any) -> Callable[[], Any]:
        def rank(group: Any) -> None:
            with leetdist.sequence_parallel(group, **options):
                pass

        return lambda: leetdist.virtual_ranks(rank, 2)

    for lengths in ([], [16], [16, 16, 16], [16, -16], [16, 1.0], ["16", "16"], "16", 32, [True, 16], {}, [None, 16]):
        yield f"sequence_parallel lengths {lengths!r}", scope(lengths=lengths), "lengths must be 2 numbers"
    for timeout in (0, -1.0, NAN, INF, "60", True, [60], torch.tensor(60.0)):
        yield f"sequence_parallel timeout {timeout!r}", scope(timeout=timeout), "timeout"
    for transport in ("nccl", "", 3, True, ["p2p"], "symmetric"):
        yield f"sequence_parallel transport {transport!r}", scope(transport=transport), "transport"
    for group in [None, *GROUPS]:
        manager = leetdist.sequence_parallel
        yield f"sequence_parallel group {group!r}", lambda g=group, m=manager: m(g).__enter__(), "group must be"
    for sequence in (0, -1, 1.0, "1", True, [1]):
        yield f"device_mesh sequence {sequence!r}", lambda s=sequence: leetdist.device_mesh(s), "sequence"
    for kind in ("tpu", "", 3, True, np.ones(2), torch.device("cpu")):
        yield f"device_mesh {kind!r}", lambda k=kind: leetdist.device_mesh(1, device_type=k), "device_type"


def layer_rows() -> Iterator[Row]:
    for layer in (leetdist.nn.LightningAttention, leetdist.nn.Retention):
        for decay in (
            tensor(2) * NAN,
            tensor(2),
            -tensor(3),
            torch.tensor([-1.0, INF]),
            "fast",
            0.5,
            None,
            [-1.0, -1.0],
        ):
            yield f"{layer.__name__} decay {decay}", partial(layer, 32, 2, decay=decay), "decay must be"
        for decay in (torch.tensor([-1.0, -INF]), tensor(2) * NAN):
            yield f"{layer.__name__} learnt {decay}", partial(layer, 32, 2, decay=decay, learnable_decay=True), "decay"


def sharded_rows() -> Iterator[Row]:
    """One rank of two is wrong; every rank raises, and none waits."""

    def bad(what: str, words: str, **of_rank: Any) -> Row:
        def rank(group: Any) -> None:
            x = tensor(B, H, 32, D)
            changes = of_rank if group.rank == 1 else {}
            leetdist.linear_attention(**({n: x for n in "qkv"} | {"tile": 16, "group": group} | changes))

        return f"sharded {what}", lambda: leetdist.virtual_ranks(rank, 2), words

    yield bad("scale", "disagree on scale", scale=2.0)
    yield bad("scale of another kind", "scale", scale="1")
    yield bad("return_state", "disagree on return_state", return_state=True)
    yield bad("return_state of another kind", "return_state", return_state="no")
    yield bad("tile", "disagree on tile", tile=32)
    yield bad("tile of another kind", "tile", tile=16.0)
    yield bad("method", "disagree on method", method="fleet")
    yield bad("one device", "one device only", method="vanilla")
    yield bad("method of another kind", "method", method=["block"])
    yield bad("precision", "disagree on precision", precision="high")
    yield bad("decay", "disagree on the values of log_decay", log_decay=-tensor(H))
    yield bad("initial_state", "first rank", initial_state=tensor(B, H, D, D))
    yield bad("q None", "q must be a tensor", q=None)
    yield bad("k sparse", "k must be a dense", k=tensor(B, H, 32, D).to_sparse())
    yield bad("v int", "v must be float", v=tensor(B, H, 32, D).int())
    yield bad("log_decay positive", "log_decay must be <= 0", log_decay=tensor(H))
    yield bad("log_decay a token", "disagree on", log_decay=-tensor(B, H, 32))
    yield bad("log_decay a token of the whole", "log_decay must have shape", log_decay=-tensor(B, H, 64))
    yield bad("log_decay positive at a token", "log_decay must be <= 0", log_decay=tensor(B, H, 32))
    yield bad("heads", "disagree on q_heads", **{n: tensor(B, 4, 32, D) for n in "qkv"})
    yield bad("dtype", "disagree on dtype", **{n: tensor(B, H, 32, D).double() for n in "qkv"})
    yield bad("cu_seqlens", "disagree on documents", cu_seqlens=torch.tensor([0, 64]))

    def different(use: Callable[..., Any]) -> Callable[[], Any]:
        def rank(group: Any) -> None:
            whole = tensor(B, H, 64 if group.rank == 0 else 96, D)
            use(leetdist.shard_sequence(whole, 2, group, tile=16), group)

        return lambda: leetdist.virtual_ranks(rank, 2)

    call = leetdist.linear_attention
    yield (
        "shards of other lengths",
        different(lambda x, g: call(x, x, x, tile=16, group=g)),
        "x: shard_sequence .*64 and",
    )
    yield "gathered of other lengths", different(lambda x, g: leetdist.gather_sequence(x, 2, g)), "x: shard_sequence"

    def gathered(of_rank: Callable[[int], tuple[Any, Any]]) -> Callable[[], Any]:
        def rank(group: Any) -> None:
            leetdist.gather_sequence(*of_rank(group.rank), group)

        return lambda: leetdist.virtual_ranks(rank, 2)

    yield "gathered dims", gathered(lambda rank: (tensor(2, 3), rank)), "gather_sequence: rank 1"
    yield "gathered dtypes", gathered(lambda rank: (tensor(2).double() if rank else tensor(2), 0)), "gather_sequence"
    yield "gathered on one rank", gathered(lambda rank: (None if rank else tensor(2), 0)), "x_local must be a tensor"
    yield "gathered dim of one rank", gathered(lambda rank: (tensor(2), 5 if rank else 0)), "dim must be in"


ROWS: list[Row] = [
    *attention_rows("linear_attention", leetdist.linear_attention),
    *(row for row in attention_rows("explain", leetdist.explain) if row[0].split()[1] in ("scale", "tile", "method")),
    *decoder_rows(),
    *sequence_rows(),
    *layer_rows(),
    *sharded_rows(),
]


def test_there_are_many() -> None:
    assert len(ROWS) >= 300


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_is_refused_in_words(row: Row) -> None:
    _, call, words = row
    begin = time.monotonic()
    with pytest.raises(ValueError, match=words):
        call()
    assert time.monotonic() - begin < 20  # no rank waited for another


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 1}, {"scale": np.float32(1)}, {"scale": np.float64(1)}, {"scale": Fraction(1)},
        {"return_state": np.bool_(False)}, {"tile": np.int64(64), "scale": np.int32(1)},
        {"method": np.str_("auto")}, {"tile": 1 << 30},
    ],
    ids=str,
)  # fmt: skip
def test_other_types_of_the_same_value(changes: dict[str, Any]) -> None:
    """A value means the same in every type that holds it, and is remembered as one."""
    expected = leetdist.linear_attention(**valid(tile=64))
    for _ in range(2):
        assert torch.equal(leetdist.linear_attention(**({"tile": 64} | valid(**changes))), expected)


def test_what_equals_a_remembered_option_is_checked() -> None:
    leetdist.linear_attention(**valid(scale=1.0, tile=16, return_state=False))
    for changes in ({"scale": True}, {"tile": 16.0}, {"return_state": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            leetdist.linear_attention(**valid(**({"scale": 1.0, "tile": 16, "return_state": False} | changes)))


def test_what_looks_like_a_remembered_tensor_is_checked() -> None:
    leetdist.linear_attention(**valid())
    for what, x in no_tensors(tensor(B, H, N, D)):
        with pytest.raises(ValueError, match="k must"):
            leetdist.linear_attention(**valid(k=x))
        assert what


def test_mixed_dtypes_under_autocast_get_a_hint() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="autocast leaves some"):
        leetdist.linear_attention(**valid(v=tensor(B, H, N, D).bfloat16()))


def test_lanes_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("0", "-1", "two", "²"):
        monkeypatch.setitem(os.environ, "LEETDIST_LANES", value)
        with pytest.raises(ValueError, match="LEETDIST_LANES must be a positive number"):
            leetdist.linear_attention(**valid(tile=32, scale=0.123, initial_state=tensor(B, H, D, D)))
