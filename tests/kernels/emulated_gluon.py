"""Kernels in Gluon on the CPU, for what they compute: one program after the other, and each of their steps at once.

Triton's interpreter does not know Gluon. Here a kernel's module is executed with another `gluon` under the same names:
blocks are tensors of PyTorch, layouts mean nothing, copies and products are done when they are started. So neither
races nor what a GPU rounds otherwise is seen; a chunk overwritten too early, a wrong index, sign or mask is.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Dtype:
    def __init__(self, torch_dtype: torch.dtype) -> None:
        self.torch = torch_dtype
        self.primitive_bitwidth = torch_dtype.itemsize * 8


DTYPES = {name: Dtype(getattr(torch, name)) for name in ("float32", "bfloat16", "float16", "int32", "int64", "bool")}
OF_TORCH = {dtype.torch: dtype for dtype in DTYPES.values()}


def plain(x: Any) -> Any:
    return x.x if isinstance(x, Block) else x


class Block:
    """A tensor, or a number, of the language."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @property
    def dtype(self) -> Dtype:
        return OF_TORCH[self.x.dtype]

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)

    def to(self, dtype: Dtype, bitcast: bool = False) -> Block:
        return Block(self.x.view(dtype.torch) if bitcast else self.x.to(dtype.torch))

    def reshape(self, shape: Sequence[int]) -> Block:
        return Block(self.x.reshape(shape))

    def __getitem__(self, index: Any) -> Block:
        return Block(self.x[index])

    def __index__(self) -> int:
        return int(self.x)

    def __bool__(self) -> bool:
        return bool(self.x)

    def __neg__(self) -> Block:
        return Block(-self.x)

    __hash__ = None  # type: ignore[assignment]


def _operator(function: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Block, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Block(torch.as_tensor(function(self.x, plain(other))))

    def backward(self: Block, other: Any) -> Any:
        return Block(torch.as_tensor(function(other, self.x)))

    return forward, backward


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or"):
    _forward, _backward = _operator(getattr(operator, f"{_name}_" if _name in ("and", "or") else _name))
    setattr(Block, f"__{_name}__", _forward)
    setattr(Block, f"__r{_name}__", _backward)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Block, f"__{_name}__", _operator(getattr(operator, _name))[0])


class Pointer:
    """Into a tensor's memory, as a kernel gets it: numbers from `at` on."""

    def __init__(self, tensor: Tensor, at: Any = 0) -> None:
        self.tensor, self.at = tensor, at
        self.dtype = SimpleNamespace(element_ty=OF_TORCH[tensor.dtype])

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.at + plain(offset))

    def memory(self) -> Tensor:
        base = self.tensor
        return torch.as_strided(base, (base.untyped_storage().nbytes() // base.itemsize - base.storage_offset(),), (1,))


class Descriptor:
    """Of a tensor (B, H, N, D), copied in blocks; zero outside."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.dtype, self.layout = tensor, OF_TORCH[tensor.dtype], None


class Shared:
    """Shared memory."""

    layout = None

    def __init__(self, x: Tensor) -> None:
        self.x = x

    dtype, shape = Block.dtype, Block.shape

    def index(self, number: Any) -> Shared:
        number = int(number)
        assert 0 <= number < len(self.x)
        return Shared(self.x[number])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.x.view(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.x.permute(order))

    def load(self, layout: Any) -> Block:
        return Block(self.x.clone())

    def store(self, value: Block) -> None:
        assert value.x.dtype == self.x.dtype
        self.x.copy_(value.x)


def reinterpret(memory: Shared, dtype: Dtype, shape: Sequence[int], layout: Any) -> Shared:
    return Shared(memory.x.reshape(-1).view(dtype.torch)[: math.prod(shape)].view(shape))


def _alike(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """Two operands; a number has the dtype of the other, or its own."""
    x, y = plain(x), plain(y)
    dtype = x.dtype if isinstance(x, Tensor) else y.dtype if isinstance(y, Tensor) else None
    if dtype is None:
        dtype = torch.float32 if isinstance(x, float) or isinstance(y, float) else torch.int32
    return tuple(x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype) for x in (x, y))  # type: ignore[return-value]


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Block]:
    return lambda x, y: Block(function(*_alike(x, y)))


def where(condition: Any, x: Any, y: Any) -> Block:
    return Block(torch.where(torch.as_tensor(plain(condition)), *_alike(x, y)))


def _reduced(function: Callable[..., Tensor], least: float) -> Callable[..., Block]:
    """Of what is not NaN, as on a GPU."""

    def reduced(x: Block, axis: int | None = None) -> Block:
        values = x.x.nan_to_num(least, math.inf, -math.inf) if x.x.is_floating_point() else x.x
        return Block(function(values, dim=() if axis is None else axis))

    return reduced


def load(pointer: Pointer, mask: Any = None, other: Any = 0, volatile: bool = False) -> Block:
    memory, at = pointer.memory(), torch.as_tensor(pointer.at)
    if mask is None:
        return Block(memory[at])
    inside = torch.broadcast_to(plain(mask), at.shape)
    return Block(torch.where(inside, memory[torch.where(inside, at, 0)], other))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    memory, at = pointer.memory(), torch.as_tensor(pointer.at)
    value = torch.as_tensor(plain(value)).to(memory.dtype).broadcast_to(at.shape)
    inside = torch.ones_like(at, dtype=torch.bool) if mask is None else torch.broadcast_to(plain(mask), at.shape)
    memory[at[inside]] = value[inside]


def async_load(descriptor: Descriptor, place: Sequence[Any], ready: Any, shared: Shared, pred: Any = True) -> None:
    if not pred:
        return
    batch, head, token, column = (int(plain(x)) for x in place)
    source = descriptor.tensor[batch, head, max(token, 0) :, column:]
    length, width = shared.x.shape[2:]
    assert token >= 0
    shared.x.zero_()
    source = source[:length, :width]
    shared.x[0, 0, : source.shape[0], : source.shape[1]] = source


def warpgroup_mma(a: Any, b: Any, total: Block, use_acc: bool = True, is_async: bool = False) -> Block:
    product = a.x.float() @ b.x.float()
    assert product.shape == total.x.shape
    return Block(total.x + product if use_acc else product)


def inline_asm_elementwise(asm: str, constraints: str, arguments: list[Block], **_: Any) -> Block:
    assert asm.startswith("ex2.approx.ftz.f32")
    return Block(torch.exp2(arguments[0].x.float()))


class _Layouts:
    """Any layout."""

    def __call__(self, *_: Any, **__: Any) -> _Layouts:
        return self

    get_default_for = __call__


_program = SimpleNamespace(ids=(0, 0, 0), grid=(1, 1, 1))
_layout = _Layouts()
LANGUAGE = {
    **DTYPES,
    **dict.fromkeys(
        ("NVMMADistributedLayout", "NVMMASharedLayout", "SwizzledSharedLayout", "DistributedLinearLayout",
         "SliceLayout", "BlockedLayout", "DotOperandLayout"), _layout,
    ),
    "constexpr": lambda x: x,
    "static_range": range,
    "program_id": lambda axis: Block(torch.tensor(_program.ids[axis])),
    "num_programs": lambda axis: _program.grid[axis],
    "arange": lambda start, end, layout=None: Block(torch.arange(start, end, dtype=torch.int32)),
    "zeros": lambda shape, dtype, layout=None: Block(torch.zeros(shape, dtype=dtype.torch)),
    "zeros_like": lambda x: Block(torch.zeros_like(x.x)),
    "where": where,
    "abs": lambda x: Block(x.x.abs()),
    "fma": lambda x, y, z: Block((x.x.double() * plain(y) + plain(z)).float()),
    "cdiv": lambda x, y: (x + y - 1) // y,
    "minimum": _binary(torch.fmin),
    "maximum": _binary(torch.fmax),
    "max": _reduced(torch.amax, -math.inf),
    "min": _reduced(torch.amin, math.inf),
    "load": load,
    "store": store,
    "convert_layout": lambda x, layout, assert_trivial=False: x,
    "inline_asm_elementwise": inline_asm_elementwise,
    "allocate_shared_memory": lambda dtype, shape, layout: Shared(
        torch.full(shape, math.nan).to(dtype.torch) if dtype.torch.is_floating_point
        else torch.zeros(shape, dtype=dtype.torch)
    ),
}  # fmt: skip
_nothing = SimpleNamespace(
    init=lambda *_, **__: None, expect=lambda *_, **__: None, wait=lambda *_, **__: None, MBarrierLayout=_layout
)


def _modules() -> dict[str, Any]:
    def jit(function: Any = None, **_: Any) -> Any:
        return function if function is not None else jit

    gluon = SimpleNamespace(jit=jit, constexpr_function=jit, language=SimpleNamespace(**LANGUAGE))
    hopper = SimpleNamespace(
        fence_async_shared=lambda: None,
        mbarrier=_nothing,
        warpgroup_mma=warpgroup_mma,
        warpgroup_mma_wait=lambda pending, deps: tuple(deps) if len(deps) > 1 else deps[0],
    )
    return {
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gluon.language,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "leetdist.kernels.runtime.gluon": SimpleNamespace(
            async_load=async_load, barrier=lambda: None, reinterpret=reinterpret
        ),
    }


def emulated(*names: str) -> list[ModuleType]:
    """The modules of these names, for the CPU, each of which may import those before it."""
    swapped, made = _modules(), []
    kept = {name: sys.modules.get(name) for name in (*swapped, *names)}
    try:
        sys.modules.update(swapped)
        for name in names:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            assert spec.loader is not None
            spec.loader.exec_module(module)
            made.append(module)
    finally:
        for name, before in kept.items():
            if before is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = before
    return made


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """leetdist.kernels.runtime.triton_launch.launch, for an emulated kernel."""
    _program.grid = grid
    handed = []
    for x in arguments:
        if isinstance(x, Tensor):
            handed.append(Pointer(x))
        elif isinstance(x, int | float) and not isinstance(x, bool):
            handed.append(Block(torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int64)))
        else:
            handed.append(Descriptor(x.base) if hasattr(x, "base") else x)
    for ids in itertools.product(*map(range, grid)):
        _program.ids = ids
        kernel(*handed, **constants)
