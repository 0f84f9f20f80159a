"""Why an implementation does not serve, from the general to the particular, in words that say what is there and what is
wanted; None where it does."""

from __future__ import annotations

import math

import torch

from leetdist.kernels.common.tiles import ceil_div
from leetdist.operators.facts import Facts, dotted

LARGEST_HEAD = 256  # of those that hold whole columns, and rows, of the state
LARGEST_WALKED = 128  # whose state, and what a tile adds to it, registers hold
# Rows of the state that a program holds; and beside fp32 inputs, whose state is in two parts, on Hopper.
MOST_ROWS, MOST_ROWS_OF_FP32 = 256, 128
MOST_ROWS_DECODED = 1024  # with 16 columns, as many numbers as 4 warps hold
MOST_TAPS = 4  # of a convolution
# Tokens; in shorter tiles the products of the kernels for Hopper are not full.
SHORTEST_ON_HOPPER = {"narrow": 128, "wide": 64}
# Tokens of a chunk of CUDA C++'s; and which sequences these kernels walk tile by tile, where a tile lies in a chunk: so
# many, heads counted, as fill a GPU, or such as have few tiles.
ONE_CHUNK, MANY_WALKED, FEW_TILES = 64, 256, 8
# Of longer tiles: blocks, of 64 columns, that walk at a time (two on each of 132 multiprocessors). And, forward and
# with backward, how long walks that fill a GPU take, and the steps, without states and for each time that these are as
# large as q: in times of reading or writing one of q, k, v and o (benchmarks/notes/short.md).
BLOCKS_WALKING, WALKS_AND_STEPS = 264, ((6.1, 5.3, 1.1), (28.5, 20.0, 3.3))
LONGEST_CHAIN = 4096  # tokens; what is lost from chunk to chunk (kernels/token_decay/cuda/by_head.py) adds up
# NVRTC 12.9 ends the process (signal 11, in its ptxas) when it compiles tile_outputs.cu for 16-bit outputs.
OLDEST_NVRTC = 13, 0
CUDA_EXTRA, TRITON_PACKAGE = "pip install leetdist[cuda]", "pip install -U triton"


def triton(facts: Facts) -> str | None:
    """NVIDIA GPUs from compute capability 8.0 on, in fp32, bf16 and fp16; or the interpreter."""
    machine, backend = facts.machine, facts.settings.backend
    if backend == "torch":
        return "LEETDIST_BACKEND=torch"
    if machine.device == "cpu":
        if backend != "triton":
            return "needs a GPU, this is a CPU"
        if facts.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 as integers; use float32 or float16"
    elif machine.device != "cuda" or machine.capability is None:
        return f"needs an NVIDIA GPU, this is {'ROCm' if machine.device == 'cuda' else machine.device}"
    elif machine.capability < (8, 0):
        return f"needs compute capability 8.0, this GPU has {dotted(machine.capability)}"
    if facts.dtype == torch.float64:
        return "computes float32, bfloat16 and float16, got float64"
    if machine.no_triton is not None:
        return f"{machine.no_triton} ({TRITON_PACKAGE})"
    return None


def triton_narrow(facts: Facts) -> str | None:
    """What holds whole columns, or rows, of the state."""
    refused = triton(facts)
    if refused is None and max(facts.rows, facts.columns) > LARGEST_HEAD:
        refused = f"head sizes up to {LARGEST_HEAD}, got {max(facts.rows, facts.columns)}"
    return refused


def triton_decode(facts: Facts) -> str | None:
    refused = triton(facts)
    if refused is None and facts.rows > MOST_ROWS_DECODED:
        refused = f"a state of up to {MOST_ROWS_DECODED} rows, got {facts.rows}"
    return refused


def cuda(facts: Facts) -> str | None:
    """NVRTC, and all that Triton's kernels, which compute the other steps, need."""
    if facts.settings.backend is not None:
        return f"LEETDIST_BACKEND={facts.settings.backend}"
    if facts.machine.device == "cpu":
        return "needs a GPU, this is a CPU"
    if facts.machine.nvrtc is None:
        return f"cuda-core with NVRTC is not installed ({CUDA_EXTRA})"
    return triton(facts)


def cuda_narrow(facts: Facts) -> str | None:
    return cuda(facts) or triton_narrow(facts)


def hopper(facts: Facts) -> str | None:
    if facts.machine.device == "cpu":
        return "needs a GPU, this is a CPU"
    if facts.machine.capability != (9, 0):
        return f"written for compute capability 9.0, this GPU has {dotted(facts.machine.capability)}"
    return None if facts.settings.hopper else "LEETDIST_HOPPER=0"


def hopper_16_bit(facts: Facts, precision: str | None = None) -> str | None:
    if facts.dtype not in (torch.bfloat16, torch.float16):
        return f"computes bfloat16 and float16, got {named(facts.dtype)}"
    if facts.precision is None and precision is not None:
        return f'is for precision="{precision}"'
    if facts.precision != precision:
        return f'has no precision="{facts.precision}"'
    return None


def sizes(facts: Facts, sizes: set[int]) -> str | None:
    if {facts.rows, facts.columns} <= sizes:
        return None
    return f"head sizes of {', '.join(map(str, sorted(sizes)))}, got {facts.rows} and {facts.columns}"


def whole_vectors(facts: Facts) -> str | None:
    """What bulk copies ask for: 16 bytes."""
    for size in (facts.rows, facts.columns):
        if size * facts.dtype.itemsize % 16:
            return f"head sizes of a multiple of {16 // facts.dtype.itemsize} in {named(facts.dtype)}, got {size}"
    return None


def long_enough(facts: Facts, least: int) -> str | None:
    return None if facts.tile >= least else f"tiles of at least {least} tokens, got {facts.tile}"


def cuda_hopper(facts: Facts, precision: str | None = None) -> str | None:
    nvrtc = facts.machine.nvrtc
    refused = hopper(facts) or cuda(facts)
    if refused is None and nvrtc is not None and nvrtc < OLDEST_NVRTC:
        refused = f"needs NVRTC {dotted(OLDEST_NVRTC)}, this is {dotted(nvrtc)} ({CUDA_EXTRA})"
    refused = refused or hopper_16_bit(facts, precision) or whole_vectors(facts)
    if refused is None and (facts.operator != "constant_decay" or precision is not None):
        refused = long_enough(facts, SHORTEST_ON_HOPPER["narrow"])
    return refused


def cuda_hopper_high(facts: Facts) -> str | None:
    refused = cuda_hopper(facts, "high")
    if refused is None and facts.rows > MOST_ROWS:
        refused = f"a state of up to {MOST_ROWS} rows, got {facts.rows}"
    return refused


def cuda_hopper_rows(facts: Facts) -> str | None:
    """Whole sequences, without their states in memory."""
    refused, (number, tiles) = cuda_hopper(facts), facts.sequences
    if refused is None and not facts.outputs_alone:
        refused = (
            "sequences without a group, states given or returned, and, with gradients, shared heads and a learnt decay"
        )
    if refused is None and max(facts.rows, facts.columns) > LARGEST_WALKED:
        refused = f"head sizes up to {LARGEST_WALKED}, got {facts.rows} and {facts.columns}"
    if refused is None and facts.tile & (facts.tile - 1):
        refused = f"tiles of a power of two tokens, got {facts.tile}"
    if refused is None and facts.tile <= ONE_CHUNK and number < MANY_WALKED and tiles > FEW_TILES:
        refused = f"{MANY_WALKED} sequences and heads, or up to {FEW_TILES} tiles of each, got {number} and {tiles}"
    if refused is None and facts.tile > ONE_CHUNK and not _walks_are_faster(facts):
        refused = f"so many sequences and heads, in tiles so short, that it is faster, got {number} and {facts.tile}"
    return refused


def _walks_are_faster(facts: Facts) -> bool:
    """Than the steps, until the last walk ends, in tiles of several chunks."""
    walk, steps, each = WALKS_AND_STEPS[facts.both_passes]
    waves = facts.sequences[0] * ceil_div(facts.columns, 64) / BLOCKS_WALKING
    states = 16 * facts.rows * facts.columns / (facts.rows + facts.columns) / facts.tile
    return waves > 0 and walk * math.ceil(waves) / waves <= steps + each * states


def cuda_hopper_bf16(facts: Facts) -> str | None:
    refused = cuda_hopper(facts)
    if refused is None and facts.dtype != torch.bfloat16:
        refused = f"computes bfloat16, got {named(facts.dtype)}"
    return refused


def cuda_hopper_gradients(facts: Facts) -> str | None:
    refused = cuda_hopper_bf16(facts) or long_enough(facts, SHORTEST_ON_HOPPER["narrow"]) or sizes(facts, {128})
    if refused is None and facts.shares != (1, 1, 1):
        refused = "heads that share nothing"
    if refused is None and facts.operator == "constant_decay" and facts.tile > LONGEST_CHAIN:
        refused = f"tiles of up to {LONGEST_CHAIN} tokens, got {facts.tile}"
    return refused


def cuda_hopper_shared_gradients(facts: Facts) -> str | None:
    refused = cuda_hopper_bf16(facts)
    if refused is None and (facts.rows not in (64, 128) or facts.columns != 64):
        refused = f"head sizes of 64 or 128 and 64, got {facts.rows} and {facts.columns}"
    of_q, of_k, of_v = facts.shares
    if refused is None and (of_q % 4 or of_k != of_q or of_v > 1):
        refused = "multiples of 4 heads that share q and k alike, and none that share v"
    return refused


def cuda_hopper_weights(facts: Facts) -> str | None:
    refused = cuda_hopper_shared_gradients(facts)
    if refused is None and not facts.weighs:
        refused = "kernels of the pass that take weights (backward, those of all gradients in two passes)"
    return refused


def gluon(facts: Facts) -> str | None:
    refused = hopper(facts) or triton(facts)
    if refused is None and facts.machine.no_gluon is not None:
        refused = f"{facts.machine.no_gluon} ({TRITON_PACKAGE})"
    return refused


def gluon_hopper(facts: Facts) -> str | None:
    refused = gluon(facts) or hopper_16_bit(facts) or long_enough(facts, SHORTEST_ON_HOPPER["narrow"])
    return refused or sizes(facts, {64, 128})


def gluon_wide(facts: Facts) -> str | None:
    return gluon(facts) or whole_vectors(facts) or long_enough(facts, SHORTEST_ON_HOPPER["wide"])


def most_rows(facts: Facts) -> int:
    return MOST_ROWS


def most_rows_wide(facts: Facts) -> int:
    return MOST_ROWS_OF_FP32 if facts.dtype == torch.float32 else MOST_ROWS


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def always(facts: Facts) -> str | None:
    return None


def pytorch(facts: Facts) -> str | None:
    """Whoever asks for Triton by name wants no other kernels in its place."""
    return "LEETDIST_BACKEND=triton" if facts.settings.backend == "triton" else None


def triton_taps(facts: Facts) -> str | None:
    return triton_narrow(facts) or (
        None if facts.columns <= MOST_TAPS else f"up to {MOST_TAPS} taps, got {facts.columns}"
    )
