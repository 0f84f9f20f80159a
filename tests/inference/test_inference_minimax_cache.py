"""transformers' MiniMax through our operator: the tokens of the model as it was, and what it could not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import Mamba2Config, Mamba2Model, MiniMaxConfig, MiniMaxForCausalLM

import leetdist
from leetdist.integrations.minimax_cache import LightningCache
from leetdist.integrations.transformers import LightningAttention

KINDS = {"l": "linear_attention", "f": "full_attention"}


def tiny(layers: str = "fllf") -> MiniMaxForCausalLM:
    torch.manual_seed(3)
    config = MiniMaxConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=len(layers), num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, block_size=8, max_position_embeddings=512,
        layer_types=[KINDS[kind] for kind in layers], pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = MiniMaxForCausalLM(config).eval()
    with torch.no_grad():  # default initialisation hardly notices what attention does
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def both(layers: str) -> tuple[MiniMaxForCausalLM, MiniMaxForCausalLM]:
    model = tiny(layers)
    return model, leetdist.parallelize(copy.deepcopy(model), None)


def generated(model: MiniMaxForCausalLM, tokens: Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(tokens, **options)


@pytest.mark.parametrize("layers", ["fllf", "lflf", "flfl"])
def test_greedy_tokens_are_those_of_the_model_as_it_was(layers: str) -> None:
    model, ours = both(layers)
    tokens = torch.randint(1, 64, (2, 37))
    expected = generated(model, tokens)
    assert torch.equal(generated(ours, tokens), expected)
    for module in ours.modules():  # and it shows when the operator is another one
        if isinstance(module, LightningAttention):
            module.decays = {torch.device("cpu"): module.log_decay(torch.device("cpu")) - 3}
    assert not torch.equal(generated(ours, tokens), expected)


def test_greedy_tokens_of_a_left_padded_batch() -> None:
    """Also: each row is what it is without padding."""
    model, ours = both("fllf")
    lengths, longest = (30, 17, 1), 30
    tokens, mask = torch.zeros(3, longest, dtype=torch.long), torch.zeros(3, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, -length:] = torch.randint(1, 64, (length,))
        mask[row, -length:] = 1
    expected = generated(model, tokens, attention_mask=mask)
    result = generated(ours, tokens, attention_mask=mask)
    assert torch.equal(result, expected)
    for row, length in enumerate(lengths):
        alone = generated(ours, tokens[row : row + 1, -length:])
        assert torch.equal(result[row, longest:], alone[0, length:])


def test_logits_and_states_agree() -> None:
    model, ours = both("fllf")
    tokens = torch.randint(1, 64, (2, 37))
    with torch.no_grad():
        expected, result = model(tokens, use_cache=True), ours(tokens, past_key_values=LightningCache(), use_cache=True)
        torch.testing.assert_close(result.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            result.past_key_values.get_linear_cache(1), expected.past_key_values.get_linear_cache(1),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
        torch.testing.assert_close(ours(tokens).logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["fllf", "lflf"])
def test_a_cache_is_continued_by_several_tokens(layers: str) -> None:
    """With a lightning layer first, transformers' own cache forgets how many tokens it holds."""
    _, ours = both(layers)
    tokens = torch.randint(1, 64, (2, 40))
    with torch.no_grad():
        whole = ours(tokens).logits
        cache = LightningCache()
        parts = [ours(part, past_key_values=cache, use_cache=True).logits for part in tokens.split([20, 13, 1, 6], 1)]
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["fllf", "lflf"])
def test_drafts_give_the_greedy_tokens(layers: str) -> None:
    """Prompt lookup drafts tokens from the prompt; wrong ones are taken back."""
    model, ours = both(layers)
    tokens = torch.randint(1, 64, (1, 12)).repeat(1, 4)
    expected = generated(model, tokens)
    assert torch.equal(generated(ours, tokens, prompt_lookup_num_tokens=5, max_matching_ngram_size=1), expected)


def test_an_assistant_model_gives_the_greedy_tokens() -> None:
    model, ours = both("fllf")
    assistant = leetdist.parallelize(copy.deepcopy(model), None)
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.2 * torch.randn_like(assistant.lm_head.weight))  # often wrong
    tokens = torch.randint(1, 64, (1, 21))
    assert torch.equal(generated(ours, tokens, assistant_model=assistant), generated(model, tokens))


def test_taking_back_leaves_no_trace() -> None:
    """Bit for bit, over the borders of forwards, and no further than the crop before."""
    q, k, v = (torch.randn(2, 4, 30, 8) for _ in range(3))
    log_decay = torch.linspace(-1, 0, 4)

    def after(*lengths: int, removed: int = 0) -> LightningCache:
        cache, begin = LightningCache(recording=True), 0
        for length in lengths:
            cache.attend(1, *(x[:, :, begin : begin + length] for x in (q, k, v)), log_decay)
            begin += length
        cache.crop(-removed)
        return cache

    for lengths, removed, same in (
        ((20, 6), 3, (20, 1, 1, 1)), ((20, 1, 1, 5), 6, (20, 1)), ((20, 6), 6, (20,)), ((20,), 4, (16,)),
        ((20, 4), 9, (15,)),
    ):  # fmt: skip
        cropped, once = after(*lengths, removed=removed), after(*same)
        assert cropped.get_seq_length(1) == once.get_seq_length(1) == sum(same)
        assert torch.equal(cropped.get_linear_cache(1), once.get_linear_cache(1))
        with pytest.raises(RuntimeError, match="can take back 0 tokens in layer 1, and 1 were asked for"):
            cropped.crop(-1)
    assert not after(7, removed=7).get_linear_cache(1).any()


def test_beams_keep_their_states() -> None:
    """Beam search by the cache is beam search that computes everything again."""
    _, ours = both("fllf")
    tokens = torch.randint(1, 64, (2, 15))
    options = {"num_beams": 3, "max_new_tokens": 10}
    assert torch.equal(generated(ours, tokens, **options), generated(ours, tokens, use_cache=False, **options))


@torch.no_grad()
def test_an_exact_model_goes_back_by_the_bits() -> None:
    """What is decoded, in drafts too and after going back, are one call's outputs: of the layer itself, for the model's
    products are PyTorch's."""
    model = leetdist.parallelize(tiny("l"), None, tile=16, exact=True)
    (layer,) = (x for x in model.modules() if isinstance(x, LightningAttention))
    assert (layer.tile, layer.exact) == (16, True)
    q, k, v = (torch.randn(2, 4, 60, 8) for _ in range(3))
    whole, _ = layer._attend(q, k, v, None, None)
    cache, decay = LightningCache(recording=True), layer.log_decay(q.device)
    assert torch.equal(layer._attend(q[:, :, :21], k[:, :, :21], v[:, :, :21], cache, None)[0], whole[:, :, :21])
    cache.crop(0)
    begin = 21
    for count, removed in ((5, 2), (1, 0), (7, 7), (9, 1), (3, 0), (8, 5)):
        at = slice(begin, begin + count)
        assert torch.equal(layer._attend(q[:, :, at], k[:, :, at], v[:, :, at], cache, None)[0], whole[:, :, at])
        cache.crop(-removed)
        begin += count - removed
    cache.reorder_cache(torch.tensor([1, 0]))
    o = cache.attend(0, *(x[[1, 0], :, begin : begin + 1] for x in (q, k, v)), decay, tile=16, exact=True)
    assert torch.equal(o, whole[[1, 0], :, begin : begin + 1])


def test_an_exact_model_generates_and_learns() -> None:
    theirs, ours = tiny("fllf"), leetdist.parallelize(tiny("fllf"), None, tile=16, exact=True)
    prompt = torch.randint(2, 64, (2, 21))
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    ours(input_ids=prompt, labels=prompt).loss.backward()
    layer = leetdist.parallelize(leetdist.nn.Mamba2(32, 4, 16), None, exact=True)
    assert (layer.tile, layer.exact) == (1024, True)
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2}
    model = Mamba2Model(Mamba2Config(num_hidden_layers=1, vocab_size=64, **sizes))
    with pytest.raises(ValueError, match="exact and tile must not be given for a model with Mamba2Mixer"):
        leetdist.parallelize(model, None, exact=True)
