"""What `parallelize` takes and refuses: by what layers do, not by what they are called, and before it acts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import leetdist
from leetdist.integrations import probe


class RetNetLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state, out = torch.zeros_like(x[:, 0]), []
        for token in self.inner(x).unbind(1):
            state = 0.9 * state + token
            out.append(state)
        return torch.stack(out, 1)


class EMA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        powers = self.alpha.sigmoid() ** torch.arange(x.shape[1])[:, None]
        return torch.fft.irfft(torch.fft.rfft(x, 2 * x.shape[1], 1) * torch.fft.rfft(powers, 2 * x.shape[1], 0), dim=1)[
            :, : x.shape[1]
        ]


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x.mT, (3, 0)), self.weight, groups=8).mT


class Mix(nn.Module):
    """Half of each token's features are the token's before it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.pad(x[..., :4], (0, 0, 1, -1)), x[..., 4:]], -1)


class Ahead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(x, (0, 0, -1, 1))


class Share(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().sum(1, keepdim=True)


class Places(nn.Module):
    """Counts its own tokens: on a shard, from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(100, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


class AttentionlessSSMGruMixer(nn.Module):
    """Each token keeps to itself, experts and all."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 3), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for expert, weight in enumerate(self.experts):
            (tokens,) = torch.where(chosen == expert)
            out.index_add_(0, tokens, flat[tokens] @ weight)
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, more: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention, self.more = nn.RMSNorm(8), leetdist.nn.LightningAttention(8, 2), more

    def forward(self, x: Tensor) -> Tensor:
        return x + self.more(x + self.attention(self.norm(x)))


class Store(nn.Module):
    """Layers that someone else calls, in an order that cannot be guessed."""

    def __init__(self, more: nn.Module) -> None:
        super().__init__()
        self.attention, self.more = leetdist.nn.LightningAttention(8, 2), more


@pytest.mark.parametrize("kind", [RetNetLayer, EMA, Smooth, Mix, Ahead, Share, Places])
@pytest.mark.parametrize("holder", [Block, Store, nn.Sequential])
def test_layers_that_mix_tokens_are_refused_by_any_name(kind: type[nn.Module], holder: Any) -> None:
    more = kind()
    model = nn.Sequential(leetdist.nn.LightningAttention(8, 2), more) if holder is nn.Sequential else holder(more)
    with pytest.raises(ValueError, match=rf"(more|1) \({kind.__name__}"):
        leetdist.parallelize(model, None)
    leetdist.parallelize(model, None, allow=[kind])


@pytest.mark.parametrize("holder", [Block, Store])
def test_layers_that_do_not_are_taken_by_any_name(holder: Any) -> None:
    leetdist.parallelize(holder(AttentionlessSSMGruMixer()), None)
    with torch.device("meta"):
        model = holder(AttentionlessSSMGruMixer())
    before = [p.device for p in model.parameters()]
    assert torch.device("meta") in before
    leetdist.parallelize(model, None)
    assert [p.device for p in model.parameters()] == before


def test_what_mixes_in_the_models_own_forward_is_seen() -> None:
    class Differences(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.diff(dim=1, prepend=x[:, :1]))

    with pytest.raises(ValueError, match=r"itself \(Differences\)"):
        leetdist.parallelize(Differences(nn.Identity()), None)


def test_what_cannot_be_tried_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(ValueError, match=r"more \(Pair, which could not be tried alone: TypeError"):
        leetdist.parallelize(Store(Pair()), None)
    leetdist.parallelize(Store(Pair()), None, allow=[Pair])


def test_trying_leaves_the_model_and_the_generators_alone() -> None:
    model = Block(AttentionlessSSMGruMixer()).bfloat16()
    model.more.register_forward_hook(lambda *_: pytest.fail("the model itself was run"))
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    with torch.inference_mode():
        assert not probe.mixing(model, [model.attention], call=probe.call_alone)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training


def test_nothing_is_changed_where_something_is_refused() -> None:
    def rank(group: Any) -> None:
        model = Block(RetNetLayer())
        with pytest.raises(ValueError, match="RetNetLayer"):
            leetdist.parallelize(model, group)
        assert model.attention.group is None

    leetdist.virtual_ranks(rank, 2)


def test_older_versions_of_transformers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr("transformers.__version__", "5.14.1")
    with pytest.raises(ValueError, match=r"transformers 5\.15 or newer.*got 5\.14\.1"):
        leetdist.parallelize(model, None)


def test_a_wrapped_model_is_refused() -> None:
    mesh = leetdist.device_mesh(sequence=1, device_type="cpu")
    model = nn.parallel.DistributedDataParallel(Block(nn.Identity()))
    with pytest.raises(ValueError, match="before DDP"):
        leetdist.parallelize(model, mesh)
    sharded = torch.distributed.fsdp.fully_shard(Block(nn.Identity()), mesh=mesh["sp"])
    with pytest.raises(ValueError, match="before DDP"):
        leetdist.parallelize(sharded, mesh)


def llama(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **changes}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
    return transformers.LlamaForCausalLM(config).eval()


def test_a_model_of_transformers_within_another() -> None:
    class Wrapper(nn.Module):
        def __init__(self, more: nn.Module) -> None:
            super().__init__()
            self.language, self.more = llama(), more

        def forward(self, **batch: Any) -> Any:
            return self.language(**batch)

    ids = torch.arange(64)[None] % 61
    with torch.random.fork_rng():
        models = [torch.manual_seed(0) and Wrapper(nn.Linear(8, 8)) for _ in range(3)]
    expected = models[2](input_ids=ids).logits

    def rank(group: Any) -> Tensor:
        model = leetdist.parallelize(models[group.rank], group)
        return leetdist.gather_sequence(model(**leetdist.shard_batch({"input_ids": ids}, group)).logits, 1, group)

    for out in leetdist.virtual_ranks(rank, 2):
        torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match=r"more \(GRU\)"):
        leetdist.parallelize(Wrapper(nn.GRU(8, 8)), None)


def test_as_many_layers_as_models_have() -> None:
    """More than the few that are tried, of those alike."""

    def rank(group: Any) -> int:
        model = leetdist.parallelize(llama(num_hidden_layers=7), group)
        return sum(layer.self_attn.group is group for layer in model.model.layers)

    assert leetdist.virtual_ranks(rank, 2) == [7, 7]


def test_sequence_classification_is_refused_on_shards() -> None:
    transformers = pytest.importorskip("transformers")
    config = llama().config
    config.pad_token_id = 0
    model = transformers.LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification"):
        leetdist.virtual_ranks(lambda group: leetdist.parallelize(model, group), 2)


def test_peft_adapters_are_taken_and_prompts_refused() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = llama()
    models = []
    for _ in range(3):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        models.append(peft.get_peft_model(copy.deepcopy(base), lora).eval())
    ids = torch.arange(96)[None] % 61
    expected = models[2](input_ids=ids, labels=ids)

    def rank(group: Any) -> tuple[Tensor, Tensor]:
        model = leetdist.parallelize(models[group.rank], group)
        out = model(**leetdist.shard_batch({"input_ids": ids, "labels": ids}, group))
        return leetdist.gather_sequence(out.logits, 1, group).detach(), out.loss.detach()

    for logits, loss in leetdist.virtual_ranks(rank, 2):
        torch.testing.assert_close(logits, expected.logits)
        torch.testing.assert_close(loss, expected.loss)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = peft.get_peft_model(copy.deepcopy(base), prompts)
    with pytest.raises(ValueError, match="learnt prompts"):
        leetdist.virtual_ranks(lambda group: leetdist.parallelize(prompted, group), 2)


@pytest.mark.parametrize(
    "layer",
    [
        leetdist.nn.LightningAttention(32, 2),
        leetdist.nn.Retention(32, 2, rotary=False),
        leetdist.nn.SimpleGLA(32, 2),
        leetdist.nn.Mamba2(32, head_dim=16, state=16),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_our_own_get_their_group(layer: nn.Module) -> None:
    x = torch.randn(1, 200, 32)
    expected = layer(x)

    def rank(group: Any) -> Tensor:
        mine = leetdist.parallelize(nn.Sequential(copy.deepcopy(layer)), group)
        return mine(leetdist.shard_sequence(x, 1, group))

    torch.testing.assert_close(torch.cat(leetdist.virtual_ranks(rank, ranks=2), 1), expected)
    assert not torch.allclose(torch.cat([layer(part) for part in x.split(100, 1)], 1), expected)  # a lost state shows
