"""The one table of who computes: which implementation serves what, what happens to one that cannot be compiled, and
that what is named is what is launched."""

from __future__ import annotations

import functools
import importlib
import json
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values
from leetdist.engine.checks import describe
from leetdist.kernels.runtime.settings import OF_TRITON, Settings
from leetdist.launch import doctor
from leetdist.operators import dispatch
from leetdist.operators import facts as facts_
from leetdist.operators.choice import Use
from leetdist.operators.dispatch import choose
from leetdist.operators.facts import Facts, Machine
from leetdist.operators.implementations import (
    CANDIDATES,
    CUDA_HOPPER,
    CUDA_HOPPER_HIGH,
    CUDA_HOPPER_LEARNT,
    GLUON_HOPPER,
    GLUON_WIDE,
    PYTORCH,
    TRITON,
    Implementation,
)
from leetdist.operators.methods import kernels_for, method_for

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER = Machine("cuda", (9, 0), "2.13.0", "3.6.0", None, None, (13, 0))
AMPERE = replace(HOPPER, capability=(8, 0))
NO_TRITON, NO_GLUON = replace(HOPPER, no_triton="absent"), replace(HOPPER, triton="3.5.1", no_gluon="Gluon")
BARE = replace(HOPPER, nvrtc=None)
OLD = replace(HOPPER, nvrtc=(12, 9))
CPU = Machine("cpu", None, "2.13.0", "3.6.0", None, None, None)
BEST, PLAIN = Settings(None, True, False), Settings(None, False, False)
TORCH = Settings("torch", True, False)
ASKED, INTERPRETED = Settings("triton", True, False), Settings("triton", True, True)


def facts(machine: Machine, dtype: torch.dtype, rows: int, columns: int, tile: int = 1024, **more: Any) -> Facts:
    return Facts(machine, more.pop("settings", BEST), dtype, rows, columns, tile, **more)


@pytest.mark.parametrize(
    ("given", "name", "reasons"),
    [
        (facts(HOPPER, BF16, 128, 128), "CUDA C++ sm_90a by NVRTC 13.0", []),
        (facts(HOPPER, FP16, 256, 64), "CUDA C++ sm_90a by NVRTC 13.0", []),
        (facts(BARE, BF16, 128, 128), "Gluon sm_90 by Triton 3.6.0", ["pip install leetdist[cuda]", ""]),
        (facts(OLD, BF16, 256, 128), "Gluon wide sm_90 by Triton 3.6.0", ["NVRTC 13.0, this is 12.9", "", "64, 128"]),
        (facts(HOPPER, FP32, 128, 128), "Gluon wide sm_90 by Triton 3.6.0", ["got float32", "", "got float32"]),
        (facts(HOPPER, FP32, 192, 128), "Gluon wide sm_90 by Triton 3.6.0", ["", "", ""]),
        (facts(HOPPER, FP16, 96, 160), "CUDA C++ sm_90a by NVRTC 13.0", []),
        (facts(HOPPER, BF16, 512, 24), "CUDA C++ sm_90a by NVRTC 13.0", []),
        (facts(HOPPER, BF16, 100, 512), "Triton sm_90 by Triton 3.6.0", ["8", "", "of 64, 128", "8"]),
        (facts(BARE, BF16, 96, 512), "Gluon wide sm_90 by Triton 3.6.0", ["cuda", "", "64, 128, got 96 and 512"]),
        (facts(AMPERE, FP32, 700, 300), "Triton sm_80 by Triton 3.6.0", ["9.0"] * 4),
        (facts(HOPPER, BF16, 128, 128, precision="high"), "CUDA C++ sm_90a by NVRTC 13.0", ["high"]),
        (facts(HOPPER, BF16, 512, 64, precision="high"), "Gluon wide sm_90 by Triton 3.6.0", ["high", "256 rows", ""]),
        (facts(HOPPER, BF16, 100, 128), "Triton sm_90 by Triton 3.6.0", ["", "", "", "of 8 in bfloat16, got 100"]),
        (facts(HOPPER, BF16, 128, 128, 16), "CUDA C++ sm_90a by NVRTC 13.0", []),
        (facts(BARE, BF16, 128, 128, 64), "Gluon wide sm_90 by Triton 3.6.0", ["", "", "128 tokens, got 64"]),
        (facts(BARE, BF16, 128, 128, 32), "Triton sm_90 by Triton 3.6.0", ["", "", "", "at least 64 tokens, got 32"]),
        (facts(AMPERE, BF16, 128, 128), "Triton sm_80 by Triton 3.6.0", ["9.0, this GPU has 8.0"] * 4),
        (facts(replace(AMPERE, capability=(7, 5)), BF16, 64, 64), "PyTorch 2.13.0 on sm_75", ["", "", "", "", "8.0"]),
        (facts(HOPPER, FP64, 64, 64), "PyTorch 2.13.0 on sm_90", ["", "", "float64", "float64", "float64"]),
        (facts(NO_TRITON, BF16, 64, 64), "PyTorch 2.13.0 on sm_90", ["absent (pip install -U triton)"] * 5),
        (facts(NO_GLUON, FP32, 64, 64), "Triton sm_90 by Triton 3.5.1", ["", "", "Gluon", "Gluon"]),
        (facts(CPU, BF16, 128, 128), "PyTorch 2.13.0", ["needs a GPU"] * 5),
        (facts(replace(HOPPER, capability=None), BF16, 64, 64), "PyTorch 2.13.0", ["", "", "", "", "ROCm"]),
        (facts(HOPPER, BF16, 128, 128, settings=TORCH), "PyTorch 2.13.0 on sm_90", ["torch"] * 5),
        (facts(HOPPER, BF16, 128, 128, settings=ASKED), "Gluon sm_90 by Triton 3.6.0", ["BACKEND", ""]),
        (facts(HOPPER, BF16, 128, 128, settings=PLAIN), "Triton sm_90 by Triton 3.6.0", ["HOPPER"] * 4),
        (facts(CPU, FP32, 16, 16, settings=INTERPRETED), "Triton interpreted by Triton 3.6.0", [""] * 4),
        (facts(HOPPER, FP16, 128, 64, operator="token_decay"), "CUDA C++ sm_90a by NVRTC 13.0", []),
    ],
    ids=str,
)  # fmt: skip
def test_the_table(given: Facts, name: str, reasons: list[str]) -> None:
    """Who computes states and outputs, and why nobody before."""
    for step in ("tile_states", "tile_outputs"):
        choice = choose(Use(step), given)
        assert choice.name == name
        assert len(choice.refused) == len(reasons)
        for (_, reason), expected in zip(choice.refused, reasons, strict=True):
            assert expected in reason


def test_who_learns_a_decay_a_head_in_two_passes() -> None:
    """Nobody else need."""
    use = Use("late_gradients")
    choice, _ = dispatch.ask(use, facts(HOPPER, BF16, 128, 128, 4096))
    assert choice is not None
    assert choice.implementation is CUDA_HOPPER_LEARNT
    for given, reason in (
        (facts(HOPPER, BF16, 128, 128, 8192), "up to 4096 tokens, got 8192"),
        (facts(HOPPER, FP16, 128, 128), "got float16"),
        (facts(HOPPER, BF16, 64, 64), "head sizes of 128, got 64 and 64"),
        (facts(HOPPER, BF16, 128, 128, shares=(1, 4, 4)), "heads that share nothing"),
        (facts(AMPERE, BF16, 128, 128), "this GPU has 8.0"),
    ):
        choice, refused = dispatch.ask(use, given)
        assert choice is None
        assert reason in refused[0][1]


def test_gradients_of_shared_heads_want_q_and_k_alike() -> None:
    """Each is added up over what shares the other."""
    of_heads = {
        shares: facts(HOPPER, BF16, 128, 64, operator="token_decay", shares=shares) for shares in ((8, 8, 1), (4, 8, 1))
    }
    choices = [dispatch.ask(Use("early_gradients"), given)[0] for given in of_heads.values()]
    assert [None if x is None else x.implementation.module for x in choices] == ["cuda.shared_gradients", None]


def test_every_candidate_has_its_functions() -> None:
    for step, candidates in CANDIDATES.items():
        for candidate in candidates:
            if candidate.compiler and importlib.util.find_spec("triton") is None:
                continue
            if (step, candidate.module) != ("step", "pytorch.decode"):
                assert callable(candidate.function(step)), (step, candidate)


def test_token_scans_and_calls_that_are_repeated() -> None:
    """replay repeats what recording saw, and would lose anything else."""
    fleet = choose(Use("fleet_outputs"), facts(HOPPER, BF16, 128, 128)).implementation
    assert (fleet.compiler, fleet.recordable, fleet.longest_tile) == ("NVRTC", True, 512)
    fleet = choose(Use("fleet_outputs"), facts(BARE, BF16, 128, 128)).implementation
    assert (fleet.compiler, fleet.recordable, fleet.longest_tile) == ("Triton", False, 512)  # launches by itself
    assert not choose(Use("token_outputs"), facts(BARE, BF16, 128, 128)).implementation.recordable
    for implementation in (CUDA_HOPPER, CUDA_HOPPER_HIGH, GLUON_HOPPER, GLUON_WIDE, TRITON):
        assert implementation.recordable
    assert not PYTORCH.recordable


def problem_of(dtype: torch.dtype = FP32, dim: int = 16, **more: Any) -> Any:
    x = torch.empty(1, 2, 300, dim, dtype=dtype)
    options: dict[str, Any] = {"initial_state": None, "return_state": False, "cu_seqlens": None, "tile": None}
    return replace(describe(x, x, x, None, scale=1.0, method="auto", **options), **more)


def on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A problem on a machine that is not here."""
    monkeypatch.setattr(dispatch, "machine_of", lambda device, settings: machine)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return problem_of(BF16, 128, device=torch.device("cuda", 0), tile=1024)


def test_costs_are_those_of_what_will_run(forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With LEETDIST_HOPPER=0 the costs of Hopper's kernels say nothing."""
    monkeypatch.setattr(dispatch, "works", lambda choice, problem: True)
    problem = on(HOPPER, monkeypatch)
    assert method_for(problem, 4096).measured_on == "sm_90"
    monkeypatch.setenv("LEETDIST_HOPPER", "0")
    assert method_for(problem, 4096).measured_on == "general"
    assert method_for(problem_of(), 4096).measured_on == "cpu"


def test_ranks_with_other_settings_and_compilers_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = on(HOPPER, monkeypatch)
    here = dispatch.backend_of(problem)
    assert "CUDA C++ sm_90a by NVRTC 13.0" in here
    for other in (replace(HOPPER, triton="3.7.0"), OLD, BARE, AMPERE, replace(HOPPER, nvrtc=(13, 1))):
        assert dispatch.backend_of(on(other, monkeypatch)) != here
    monkeypatch.setenv("LEETDIST_HOPPER", "0")
    assert dispatch.backend_of(on(HOPPER, monkeypatch)) != here


def test_ranks_whose_triton_compiles_otherwise_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton takes from the environment is in the name that ranks compare, and that `explain` prints."""
    for name in OF_TRITON:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(facts_, "_capability", lambda device: (8, 0))

    def name_of(**changes: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            problem = problem_of(BF16, 128, device=torch.device("cuda", 0), tile=1024)
            return choose(Use("tile_outputs"), dispatch.facts_of(problem, 1024)).name

    here = name_of()
    assert re.fullmatch(r"Triton sm_80 by Triton [\d.]+", here)
    for name in OF_TRITON:
        assert name_of(**{name: "1"}) == f"{here} with {name}=1"
    assert name_of(TRITON_FORCE_DISABLE_FP_FUSION="1", LEETDIST_BACKEND="torch").startswith("PyTorch")
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = choose(Use("fold"), dispatch.facts_of(problem_of(), 16)).name
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert choose(Use("fold"), dispatch.facts_of(problem_of(), 16)).name == interpreted  # nothing is compiled


def refuse_to_compile(*names: str) -> Any:
    """A `rehearse` under which kernels of these names cannot be compiled."""

    def rehearse(choice: Any, problem: Any) -> None:
        if choice.implementation.name in names:
            raise RuntimeError(f"ptxas ended with an error\nin {choice.use.step}")

    return rehearse


def test_what_cannot_be_compiled_is_passed_over_once(forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = on(HOPPER, monkeypatch)
    monkeypatch.setattr(dispatch, "rehearse", refuse_to_compile("CUDA C++", "Gluon"))
    with pytest.warns(RuntimeWarning, match=r"CUDA C\+\+ sm_90a .*cannot be compiled.*instead.*ptxas ended") as seen:
        kernels = kernels_for(problem, 4096)
    assert [x.filename for x in seen] == 2 * [__file__]  # one a kernel, whatever it was to compute
    assert str(kernels) == "Gluon wide sm_90 by Triton 3.6.0, Triton sm_90 by Triton 3.6.0"
    outputs = next(choice for choice in kernels.choices if choice.use == Use("tile_outputs"))
    assert outputs.implementation is GLUON_WIDE
    assert [who for who, _ in outputs.refused] == [CUDA_HOPPER, CUDA_HOPPER_HIGH, GLUON_HOPPER]
    assert sum("cannot be compiled (RuntimeError: ptxas ended" in reason for _, reason in outputs.refused) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert str(kernels_for(replace(problem, scale=2.0), 4096)) == str(kernels)  # known: nothing is said twice


def test_a_kernel_that_fails_in_one_direction_is_replaced_there(
    forgotten: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass has the same kernels whether or not a backward pass follows."""

    def rehearse(choice: Any, problem: Any) -> None:
        if choice.use.reverse and choice.implementation is PYTORCH_TWIN:
            raise RuntimeError("no registers left")

    twin = PYTORCH_TWIN
    for step in ("tile_states", "tile_outputs", "fold"):
        monkeypatch.setitem(CANDIDATES, step, (twin, PYTORCH))
    monkeypatch.setattr(dispatch, "rehearse", rehearse)
    q, k, v = (torch.randn(1, 2, 100, 16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        alone = leetdist.linear_attention(q, k, v, method="block")
    with pytest.warns(RuntimeWarning, match="no registers left"):
        o = leetdist.linear_attention(q, k, v, method="block")
    o.sum().backward()
    assert torch.equal(o, alone)
    by = {(c.use.step, c.use.reverse): c.implementation for c in kernels_for(problem_of(needs_grad=True), 300).choices}
    assert by["tile_outputs", False] is twin
    assert by["tile_outputs", True] is PYTORCH


PYTORCH_TWIN = Implementation("Twin", "pytorch.block", lambda facts: None, compiler="Triton")


def test_errors_of_the_device_are_not_the_kernels(forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def rehearse(choice: Any, problem: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(dispatch, "rehearse", rehearse)
    with pytest.raises(torch.OutOfMemoryError):
        kernels_for(on(HOPPER, monkeypatch), 4096)
    assert not dispatch._failed


def fails_on_rank_1(rank: int) -> str:
    """Both have the same to compute with, and only one can compile it."""
    x = torch.randn(1, 2, 64, 16)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in ("tile_states", "tile_outputs", "fold"):
            patch.setitem(CANDIDATES, step, (PYTORCH_TWIN, PYTORCH))
        patch.setattr(dispatch, "rehearse", refuse_to_compile("Twin") if rank else lambda choice, problem: None)
        with pytest.raises(ValueError, match="disagree on the kernels") as caught:
            leetdist.linear_attention(x, x, x, method="block", group=dist.group.WORLD)
    dispatch._backend_of.cache_clear()
    leetdist.linear_attention(x, x, x, method="fleet", group=dist.group.WORLD)  # the group goes on
    return str(caught.value)


def test_ranks_compare_what_they_ended_with() -> None:
    told = values(run_ranks(fails_on_rank_1, 2))
    assert told[0] == told[1]
    assert "rank 1 has PyTorch 2" in told[0]
    assert "rank 0 has Twin by Triton" in told[0]


@pytest.mark.parametrize("call", ["whole", "step", "steps"])
def test_the_interpreter_computes_no_bfloat16(call: str, forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies bf16 as integers."""
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    x, state = torch.randn(1, 2, 1, 16, dtype=BF16), torch.zeros(1, 2, 16, 16)
    calls = {
        "whole": lambda: leetdist.linear_attention(x, x, x),
        "step": lambda: leetdist.linear_attention_step(x, x, x, state),
        "steps": lambda: leetdist.linear_attention_steps(x, x, x, state),
    }
    for interpreted, words in (("1", "multiplies bfloat16 as integers"), ("0", "TRITON_INTERPRET=1")):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        with pytest.raises(ValueError, match=f"LEETDIST_BACKEND=triton.*{words}"):
            calls[call]()


def test_settings_have_few_values(forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 1, 20, 16)
    monkeypatch.setenv("LEETDIST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="LEETDIST_BACKEND must be torch or triton, got 'cuda'"):
        leetdist.linear_attention(x, x, x)
    monkeypatch.delenv("LEETDIST_BACKEND")
    monkeypatch.setenv("LEETDIST_HOPPER", "yes")
    with pytest.raises(ValueError, match="LEETDIST_HOPPER must be 0 or 1, got 'yes'"):
        leetdist.linear_attention(x, x, x)


MODULES = {candidate.module for candidates in CANDIDATES.values() for candidate in candidates}


def launched(monkeypatch: pytest.MonkeyPatch, call: Any) -> set[str]:
    """The modules of kernels whose functions compute the call."""
    seen: set[str] = set()

    def spied(module: str, function: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.add(module)
            return function(*args, **kwargs)

        return functools.update_wrapper(spy, function)

    for step, candidates in CANDIDATES.items():
        for candidate in candidates:
            if candidate.compiler and importlib.util.find_spec("triton") is None:
                continue
            name = dict(candidate.functions).get(step, step)
            module = candidate.loaded()
            if hasattr(module, name) and not hasattr(getattr(module, name), "__wrapped__"):
                monkeypatch.setattr(module, name, spied(candidate.module, getattr(module, name)))
    call()
    return seen


def named(text: str) -> set[str]:
    """The modules that `explain` says compute."""
    part = text.split("kernels  ")[1].split("\nnot ")[0]
    return {module for module in MODULES if f"({module})" in part}


def assert_named_is_launched(monkeypatch: pytest.MonkeyPatch, method: str, *, grad: bool, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 70, dim).to(dtype).requires_grad_(grad) for dim in (16, 16, 24))
    log_decay = torch.tensor([-0.1, -0.2]).requires_grad_(grad)

    def call() -> None:
        o = leetdist.linear_attention(q, k, v, log_decay, method=method, tile=16)
        if grad:
            o.sum().backward()

    computed = launched(monkeypatch, call)
    assert named(leetdist.explain(q, k, v, log_decay, method=method, tile=16)) == computed
    assert computed


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("method", ["auto", "block", "lightning", "fleet", "causal_dot_product"])
def test_what_is_named_is_launched(method: str, grad: bool, forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_named_is_launched(monkeypatch, method, grad=grad, dtype=BF16)


@pytest.mark.interpreter
@pytest.mark.parametrize("method", ["lightning", "fleet", "causal_dot_product"])
def test_what_is_named_is_launched_interpreted(method: str, forgotten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEETDIST_BACKEND", "triton")
    assert_named_is_launched(monkeypatch, method, grad=True, dtype=FP32)


def test_doctor_says_what_runs(forgotten: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert doctor.main(["--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["torch"] == torch.__version__
    assert len(found["calls"]) == len(doctor.CALLS) + 2
    x = torch.randn(1, 2, 64, 128, dtype=BF16)
    computed = launched(monkeypatch, lambda: leetdist.linear_attention(x, x, x))
    assert {kernel["module"] for kernel in found["calls"][0]["kernels"]} == computed
    assert doctor.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for words in ("transformers", "bf16, heads of 100: method block", "step by PyTorch", "needs a GPU, this is a CPU"):
        assert words in said


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    used = [choose(Use("tile_outputs"), facts(BARE, BF16, 128, 128))]
    told = doctor._ran(used)
    assert told["install"] == ["pip install leetdist[cuda]"]
    assert told["refused"][0]["name"] == "CUDA C++"
