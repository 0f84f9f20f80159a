"""The layers with a decay a token: Mamba-2, whose public checkpoints load, and SimpleGLA."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import leetdist
from leetdist.launch.model import Config, LanguageModel
from leetdist.nn import Mamba2, Mamba2State, SimpleGLA
from leetdist.reference import relative_error

DIM, TOKENS = 32, 100
DOCUMENTS = (0, 20, 21, 60, 100)


def mamba(**more) -> Mamba2:
    return Mamba2(DIM, head_dim=8, state=16, groups=2, **more)


LAYERS = {"mamba2": mamba, "gla": lambda **more: SimpleGLA(DIM, 4, **more)}


def transformers_pair(dtype: torch.dtype = torch.float32, **more):
    """Their layer, with parameters that are not those of a start, and ours with its weights."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    options = {"hidden_size": DIM, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 32}
    config = modeling.Mamba2Config(num_hidden_layers=1, **options, **more)
    theirs = modeling.Mamba2Mixer(config, 0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    ours = mamba(
        bias=config.use_bias, conv_bias=config.use_conv_bias, conv=config.conv_kernel,
        eps=config.layer_norm_epsilon, dt_limit=config.time_step_limit,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return modeling, theirs.to(dtype), ours.to(dtype)


@pytest.mark.parametrize(
    "more", [{}, {"use_bias": True, "use_conv_bias": False, "time_step_limit": (0.2, 0.8)}], ids=str
)
def test_loads_the_weights_of_transformers(more: dict) -> None:
    _, theirs, ours = transformers_pair(**more)
    x = torch.randn(2, TOKENS, DIM)
    y, right = ours(x), theirs(x)
    assert relative_error(y, right) < 2e-6
    dy = torch.randn_like(y)
    y.backward(dy)
    right.backward(dy)
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, theirs[name].grad) < 2e-5, name


def test_weights_of_transformers_in_bf16() -> None:
    """As near to fp32 as theirs, whose scan is fp32 throughout."""
    _, theirs, ours = transformers_pair()
    x = torch.randn(2, TOKENS, DIM).bfloat16()
    ours.bfloat16()
    theirs.load_state_dict(ours.state_dict())
    right = theirs(x.float())
    error = relative_error(ours(x), right)
    assert error < 1e-2
    assert error <= 1.1 * relative_error(theirs.bfloat16()(x), right)


def test_goes_on_from_the_cache_of_transformers() -> None:
    modeling, theirs, ours = transformers_pair()
    x = torch.randn(2, TOKENS + 1, DIM)
    cache = modeling.DynamicCache(
        config=modeling.Mamba2Config(num_hidden_layers=1, hidden_size=DIM, num_heads=8, head_dim=8)
    )
    theirs(x[:, :TOKENS], cache_params=cache)
    y, state = ours(x[:, :TOKENS], return_state=True)
    assert relative_error(state.ssm, cache.get_recurrent_state(0)) < 2e-6
    y, _ = ours(x[:, TOKENS:], state=state, return_state=True)
    assert relative_error(y, theirs(x[:, TOKENS:], cache_params=cache)) < 2e-6


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_equals_the_whole(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 40, DIM)
    whole = layer(x)
    y, state = layer(x[:, :37], return_state=True)
    torch.testing.assert_close(y, whole[:, :37])
    for t in range(37, 40):
        y, state = layer(x[:, t : t + 1], state=state, return_state=True)
        torch.testing.assert_close(y, whole[:, t : t + 1])


def test_a_step_writes_over_its_state_where_it_may() -> None:
    """And its gradients are those of the scan that it stands for."""
    layer, x = mamba(dt_limit=(0.0, 0.5)), torch.randn(2, 11, DIM)
    _, state = layer(x[:, :10], return_state=True)
    y, after = layer(x[:, 10:], state=state, return_state=True)
    for found, wanted in zip(torch.autograd.grad(y.sum(), list(layer.parameters())), gradients(layer, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.inplace = True
        mine = Mamba2State(*(part.detach().clone() for part in state))
        again, new = layer(x[:, 10:], state=mine, return_state=True)
    assert new.ssm is mine.ssm
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(new, after)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_compiled_step_writes_over_its_state(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 11, DIM)
    _, state = layer(x[:, :10], return_state=True)
    y, after = layer(x[:, 10:], state=state, return_state=True)
    layer.inplace = True
    found, new = torch.compile(layer, fullgraph=True, backend="aot_eager")(x[:, 10:], state=state, return_state=True)
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(new, after)
    mine, given = (part.ssm if name == "mamba2" else part for part in (new, state))
    assert mine.data_ptr() == given.data_ptr()


def gradients(layer: Mamba2, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of the last token's outputs, through all tokens."""
    return torch.autograd.grad(layer(x)[:, 10:].sum(), list(layer.parameters()))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 4e-15)], ids=["float32", "float64"]
)
def test_sharded_layer_equals_whole(name: str, ranks: int, dtype: torch.dtype, bound: float) -> None:
    """Outputs, the state, and the sum over ranks of every parameter's gradient, with checkpointing."""
    layer = LAYERS[name]().to(dtype)
    x, dy = torch.randn(2, 2, TOKENS, DIM, dtype=dtype)
    whole, state = layer(x, return_state=True)
    (whole * dy).sum().backward()

    def rank(group):
        local = LAYERS[name](group=group).to(dtype)
        local.load_state_dict(layer.state_dict())
        mine, my_dy = (leetdist.shard_sequence(y, 1, group) for y in (x, dy))
        y, end = torch.utils.checkpoint.checkpoint(local, mine, use_reentrant=False, return_state=True)
        (y * my_dy).sum().backward()
        return y.detach(), end, {key: p.grad for key, p in local.named_parameters()}

    results = leetdist.virtual_ranks(rank, ranks)
    torch.testing.assert_close(torch.cat([y for y, _, _ in results], 1), whole)
    for _, end, _ in results:
        torch.testing.assert_close(end, state)
    for key, p in layer.named_parameters():
        error = relative_error(sum(grads[key] for _, _, grads in results), p.grad)
        assert error <= bound, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize(("name", "told"), [("mamba2", "cu_seqlens"), ("mamba2", "seq_idx"), ("gla", "cu_seqlens")])
def test_documents_are_as_if_alone(name: str, told: str) -> None:
    layer, x = LAYERS[name](), torch.randn(1, TOKENS, DIM)
    spans = list(pairwise(DOCUMENTS))
    options = {"cu_seqlens": torch.tensor(DOCUMENTS)}
    if told == "seq_idx":
        options = {"seq_idx": torch.repeat_interleave(torch.arange(4), torch.tensor([b - a for a, b in spans]))[None]}
    packed = layer(x, **options)
    for begin, end in spans:
        torch.testing.assert_close(packed[:, begin:end], layer(x[:, begin:end]))
    if told == "seq_idx":
        return
    _, states = layer(x, return_state=True, **options)
    for row, (begin, end) in enumerate(spans):
        _, state = layer(x[:, begin:end], return_state=True)
        for packed_state, own in zip(states, state, strict=True) if name == "mamba2" else [(states, state)]:
            torch.testing.assert_close(packed_state[row : row + 1], own)


def test_language_model_in_a_session() -> None:
    """The prompt shared by ranks, forked, and gone on with: the logits of one forward."""
    model = LanguageModel(Config(dim=32, layers=2, heads=2, hidden=64, operator="mamba2"))
    tokens = torch.randint(256, (2, 60))
    logits = model(tokens)

    def rank(group):
        session = leetdist.Session(model, group, piece=20)
        first = session.prefill(tokens[:, :57])
        session.fork(2)
        later = [session.step(tokens[:, t : t + 1].repeat_interleave(2, 0)) for t in (57, 58)]
        with pytest.raises(ValueError, match="keep: the states of these layers"):
            session.keep()
        return first, *later

    for found in leetdist.virtual_ranks(rank, 2):
        torch.testing.assert_close(found[0], logits[:, 56])
        for t, later in zip((57, 58), found[1:], strict=True):
            torch.testing.assert_close(later, logits[:, t].repeat_interleave(2, 0))


@pytest.mark.gpu
def test_session_on_a_gpu() -> None:
    """Its steps are a captured graph, which moves both tensors of a layer's state on."""
    model = LanguageModel(Config(dim=32, layers=2, heads=2, hidden=64, operator="mamba2")).cuda()
    tokens = torch.randint(256, (2, 60), device="cuda")
    with torch.no_grad():
        logits = model(tokens)
    session = leetdist.Session(model)
    torch.testing.assert_close(session.prefill(tokens[:, :50]), logits[:, 49], rtol=1e-4, atol=1e-4)
    for t in range(50, 60):
        later = session.step(tokens[:, t : t + 1])
        torch.testing.assert_close(later, logits[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_parallelize_knows_the_layers(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, DIM), LAYERS[name]())
    x = torch.randn(1, TOKENS, 8)
    whole = model(x)

    def rank(group):
        mine = leetdist.parallelize(copy.deepcopy(model), group)
        return mine(leetdist.shard_sequence(x, 1, group)).detach()

    torch.testing.assert_close(torch.cat(leetdist.virtual_ranks(rank, 2), 1), whole)


def test_a_session_keeps_the_states_of_simple_gla() -> None:
    model = LanguageModel(Config(dim=DIM, layers=1, heads=2, hidden=64))
    model.blocks[0].attention = SimpleGLA(DIM, 4)
    tokens = torch.randint(256, (1, 30))
    logits = model(tokens)
    session, other = leetdist.Session(model), leetdist.Session(model)
    session.prefill(tokens[:, :28])
    other.resume(session.keep())
    for t in (28, 29):
        torch.testing.assert_close(other.step(tokens[:, t : t + 1]), logits[:, t])


@pytest.mark.parametrize("name", LAYERS)
def test_compiles_as_one_graph(name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 50, DIM)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, right = compiled(x), layer(x)
    torch.testing.assert_close(y, right)
    right.sum().backward()
    grads = {key: p.grad for key, p in layer.named_parameters()}
    layer.zero_grad()
    y.sum().backward()
    for key, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_runs_on_fake_tensors(name: str) -> None:
    with FakeTensorMode():
        assert LAYERS[name]()(torch.randn(2, 50, DIM)).shape == (2, 50, DIM)


def test_documents_of_a_single_token_are_looked_at() -> None:
    layer, x, state = SimpleGLA(DIM, 4), torch.randn(1, 1, DIM), torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(layer(x, state=state, cu_seqlens=torch.tensor([0, 0, 1])), layer(x, state=state[1:]))
    with pytest.raises(ValueError, match="cu_seqlens must end at"):
        layer(x, state=state[:1], cu_seqlens=torch.tensor([0, 5]))


def test_starts_as_published() -> None:
    layer = Mamba2(64, head_dim=1, state=4)
    A, dt = layer.A_log.detach().exp(), torch.nn.functional.softplus(layer.dt_bias.detach())
    assert bool(((A >= 1) & (A <= 16)).all())
    assert bool(((dt >= 0.99e-3) & (dt <= 0.1001)).all())
    # Uniform in A and in the logarithm of dt: the means of 128.
    assert float(A.mean()) == pytest.approx(8.5, abs=1.5)
    assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=0.45)
    assert bool((layer.D == 1).all())


@pytest.mark.parametrize("name", LAYERS)
def test_meta_initialisation(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer.to_empty(device="cpu")
    for module in layer.modules():
        reset = getattr(module, "reset_parameters", None)
        assert reset is not None or not list(module.parameters(recurse=False))
        if reset is not None:
            reset()
    assert all(bool(p.isfinite().all()) for p in layer.parameters())


def test_state_is_named() -> None:
    _, state = mamba()(torch.randn(2, 50, DIM), return_state=True)
    assert isinstance(state, Mamba2State)
    assert state.conv.shape == (2, 3, 64 + 2 * 2 * 16)
    assert state.ssm.shape == (2, 8, 8, 16)
    assert state.ssm.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mamba2(32, heads=3, head_dim=8), "heads \\* head_dim must be"),
        (lambda: Mamba2(32, head_dim=8, groups=3), "groups must divide the 8 heads"),
        (lambda: Mamba2(32, head_dim=0), "head_dim must be at least 1"),
        (lambda: Mamba2(32, head_dim=8, state=0), "state must be at least 1"),
        (lambda: Mamba2(32, head_dim=8, conv=0), "conv must be at least 1"),
        (lambda: Mamba2(64, -4, -32), "head_dim must be at least 1"),
        (lambda: Mamba2(64, 2.0, 64), "heads must be a whole number"),
        (lambda: Mamba2(64, expand=math.nan), "expand must be a positive number"),
        (lambda: Mamba2(64, dt_limit=(1.0, 0.0)), "dt_limit must be"),
        (lambda: leetdist.nn.GatedRMSNorm(64, 24), "size must divide the width 64, got 24"),
        (lambda: SimpleGLA(0, 1), "dim must be at least 1"),
        (lambda: SimpleGLA(8, 2.0), "heads must be a whole number"),
        (lambda: SimpleGLA(8, 2, 0), "value_dim must be at least 1, got 0"),
        (lambda: SimpleGLA(8, 2, normalizer=math.inf), "normalizer must be positive"),
        (lambda: SimpleGLA(8, 2)(torch.ones(1, 4, 8), return_state="a"), "return_state must be True or False"),
        (lambda: SimpleGLA(32, 5), "heads must divide the width 32, got 5"),
        (lambda: SimpleGLA(32, 4, normalizer=0), "normalizer must be positive"),
    ],
)
def test_wrong_sizes_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_slow_gates_stay_slow_in_bf16() -> None:
    layer = SimpleGLA(DIM, 4)
    torch.nn.init.constant_(layer.gk_proj.bias, 8.0)
    torch.nn.init.zeros_(layer.gk_proj.weight)
    decay = layer.bfloat16().log_decay(torch.randn(1, 10, DIM).bfloat16())
    assert decay.dtype == torch.float32
    torch.testing.assert_close(decay, torch.full_like(decay, -math.log1p(math.exp(-8.0)) / 16))
