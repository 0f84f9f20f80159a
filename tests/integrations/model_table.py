"""Every causal language model of transformers on two ranks: exact, or refused in words; never silently wrong.

    python tests/integrations/model_table.py [NAME ...] > tests/integrations/model_table.txt

Not in CI, which runs a dozen of the rows (test_model_table.py): all of them take a quarter of an hour. Each model is
built from a tiny configuration, with weights large enough for what is lost to show, in a process of its own; what two
virtual ranks compute is compared with transformers' own model on the whole sequence (packed documents: on each alone;
Trainer: one step of two gloo ranks that share the rows, with the gradient of the mean over all of them).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from families import FAMILIES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import leetdist

CELLS = ("logits", "loss", "gradients", "generation", "packed", "Trainer")
RANKS, TOKENS, CUT, TOLERANCE, TIMEOUT_S = 2, 96, 37, 1e-3, 200
LEARNING_RATE = 0.1
TINY = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "d_model": 32, "ffn_dim": 48, "decoder_layers": 2,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 16, "block_size": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 48,
    "n_layers": 2, "n_heads": 4, "embed_dim": 32, "word_embed_proj_dim": 32, "state_size": 8, "conv_kernel": 4,
    "expand": 2, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64,
    "attention_head_size": 8, "sliding_window": 16, "multi_query": False, "first_k_dense_replace": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 67, "rotary_dim": 4, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "partial_rotary_factor": 0.5, "num_kv_shared_layers": 0,
}  # fmt: skip
# Where a name means another thing, or one follows from others.
CHANGES: dict[str, dict[str, Any]] = {
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0},  # or its cache has other sizes than its layers
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1}, "codegen": {"rotary_dim": 4}, "gptj": {"rotary_dim": 4},
    "minimax": {"num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]},
    **{name.lower(): {**FAMILIES[name], "vocab_size": 67} for name in ("Bamba", "GraniteMoeHybrid", "Zamba2")},
    "nemotron_h": {**FAMILIES["NemotronH"], "vocab_size": 67},
    "llama": {"num_key_value_heads": 2}, "gpt_neo": {"attention_types": [[["global"], 2]]}, "fuyu": {},
}  # fmt: skip


# Of weights. Zamba2's own gradients would move by 1 % with the last bits of its weights.
LARGE, LESS = 1.5, {"zamba2": 0.75}


def configuration(kind: str) -> Any:
    """A tiny one: the default, with all numbers of TINY that it has; without those that it does not take together."""
    build = CONFIG_MAPPING[kind]
    changes = shrunk(build())
    errors = []
    for left_out in ((), ("layer_types",), ("head_dim",), ("partial_rotary_factor",), ("layer_types", "head_dim")):
        wanted = {name: value for name, value in changes.items() if name not in left_out} | CHANGES.get(kind, {})
        try:
            config = build(**wanted)
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
            if (count := sum(p.numel() for p in model.parameters())) > 3e7:
                raise ValueError(f"not tiny: {count:.0e} parameters")
            return config
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:100])
    raise ValueError(errors[0])


def shrunk(config: Any) -> dict[str, Any]:
    """What of TINY a configuration has, its own parts included."""
    known = config.to_dict()
    changes = {name: value for name, value in TINY.items() if known.get(name) is not None}
    changes |= {name: 0.0 for name, x in known.items() if "drop" in name and isinstance(x, float)}
    changes |= {"is_decoder": True} if "is_decoder" in known else {}
    if known.get("layer_types"):
        kinds = list(dict.fromkeys(known["layer_types"]))
        changes["layer_types"] = kinds + kinds[-1:] * (2 - len(kinds))
        changes["num_hidden_layers"] = len(changes["layer_types"])
    for name in getattr(config, "sub_configs", {}):
        if (part := getattr(config, name, None)) is not None:
            changes[name] = {**part.to_dict(), **shrunk(part)}
    return changes


def built(kind: str) -> Any:
    """The model: a million parameters at most, large weights, no two alike."""
    config = configuration(kind)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape) * (LESS.get(kind, LARGE) * min(p.shape[-2:]) ** -0.5))
            elif p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    if bool(expected.isnan().any()):
        raise ValueError("transformers' own model gives NaN")
    return float((out - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def verdict(error: float) -> str:
    return "exact" if error < TOLERANCE else f"WRONG {error:.0e}"


def said(error: BaseException) -> str:
    """Refusals are ours, and in words; what is raised otherwise tells of a fault."""
    text = f"{error}".splitlines()[0] if f"{error}" else ""
    return "refused" if isinstance(error, ValueError) else f"ERROR {type(error).__name__}: {text[:60]}"


def on_ranks(kind: str, work: Callable[[Any, Any], Any]) -> list[Any]:
    models = [built(kind) for _ in range(RANKS)]  # here: the ranks are threads, which share one random generator
    return leetdist.virtual_ranks(lambda group: work(leetdist.parallelize(models[group.rank], group), group), RANKS)


def batch_of(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 67, (rows, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 10:50] = -100
    return {"input_ids": ids, "labels": labels}


def accepts(model: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(type(model).forward).parameters


def trained(kind: str) -> dict[str, str]:
    """logits, loss, gradients."""
    batch = batch_of()
    model = built(kind)
    out = model(**batch, use_cache=False) if accepts(model, "use_cache") else model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def logits(model: Any, group: Any) -> Any:
        local = leetdist.shard_batch({"input_ids": batch["input_ids"]}, group)
        if not accepts(model, "position_ids"):
            local.pop("position_ids")
        with torch.no_grad():
            return leetdist.gather_sequence(model(**local).logits, 1, group)

    def loss(model: Any, group: Any) -> Any:
        local = leetdist.shard_batch(batch, group)
        if not accepts(model, "position_ids"):
            local.pop("position_ids")
        mine = model(**local).loss
        (mine / RANKS).backward()
        return mine.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    cells = {"logits": cell(lambda: max(relative(x, out.logits.detach()) for x in on_ranks(kind, logits)))}
    try:
        found = on_ranks(kind, loss)
    except Exception as error:
        return cells | {"loss": said(error), "gradients": said(error)}
    cells["loss"] = verdict(max(relative(x, out.loss.detach()) for x, _ in found))
    summed = {name: sum(g[name] for _, g in found if name in g) for name in grads}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    worst = max(float((summed[name] - grad).abs().max()) for name, grad in grads.items()) / largest
    return cells | {"gradients": verdict(worst)}


def cell(error: Callable[[], float]) -> str:
    try:
        return verdict(error())
    except Exception as raised:
        return said(raised)


def generated(kind: str) -> str:
    ids = batch_of()["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model = built(kind)
    # Without a cache where there is a choice: with one, Mamba-2's layers of transformers do not keep dt in its limits.
    more = {"use_cache": False} if kind in {name.lower() for name in FAMILIES} else {}
    expected = model.generate(ids, **options, **more)

    def rank(model: Any, group: Any) -> Any:
        with torch.no_grad():
            return model.generate(ids, **options)

    return cell(lambda: max(float((x != expected).sum()) for x in on_ranks(kind, rank)))


def packed(kind: str) -> str:
    ids = batch_of(1)["input_ids"]
    model = built(kind)
    more = {"use_cache": False} if accepts(model, "use_cache") else {}
    with torch.no_grad():
        alone = torch.cat([model(part, **more).logits for part in ids.split([CUT, TOKENS - CUT], 1)], 1)
    positions = torch.cat([torch.arange(CUT), torch.arange(TOKENS - CUT)])[None]

    def rank(model: Any, group: Any) -> Any:
        with torch.no_grad():
            local = leetdist.shard_batch({"input_ids": ids, "position_ids": positions}, group)
            return leetdist.gather_sequence(model(**local).logits, 1, group)

    return cell(lambda: max(relative(x, alone) for x in on_ranks(kind, rank)))


def step_of_trainer(rank: int, kind: str, ranks: int, folder: str) -> Any:
    """The parameters' changes after one step of transformers' Trainer on four rows, dealt to the ranks."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    model = built(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = leetdist.parallelize(model, leetdist.device_mesh(sequence=1, device_type="cpu"))
    batch = batch_of(4)
    rows = [{name: x[row] for name, x in batch.items()} for row in range(4)]
    options = transformers.TrainingArguments(
        folder, per_device_train_batch_size=4 // ranks, max_steps=1, learning_rate=LEARNING_RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, ddp_find_unused_parameters=True,
    )  # fmt: skip
    transformers.Trainer(model, options, train_dataset=rows).train()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def by_trainer(kind: str) -> str:
    model = built(kind).train()
    model.config.use_cache = False  # into which xLSTM's own code writes what its backward still needs
    loss = model(**batch_of(4)).loss
    if not torch.equal(loss, model(**batch_of(4)).loss):
        return "random"  # in training, whatever trains it: there is nothing to compare with
    loss.backward()
    expected = {name: -LEARNING_RATE * p.grad for name, p in model.named_parameters() if p.grad is not None}
    with tempfile.TemporaryDirectory() as folder:
        found = forked(step_of_trainer, RANKS, kind, RANKS, folder)
    if isinstance(found[0], BaseException):
        return said(found[0])
    largest = max(float(x.abs().max()) for x in expected.values())
    return verdict(max(float((run[k] - x).abs().max()) for run in found for k, x in expected.items()) / largest)


def forked(function: Callable[..., Any], count: int, *args: Any, seconds: float = 60.0) -> list[Any]:
    """What `function(rank, *args)` returns or raises in `count` forks of this process."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                with contextlib.suppress(BaseException), silence():
                    try:
                        value = function(rank, *args)
                    except BaseException as error:
                        kind = ValueError if isinstance(error, ValueError) else RuntimeError
                        value = kind(f"{type(error).__name__}: {error}".splitlines()[0][:200])
                    Path(folder, f"{rank}.part").write_bytes(pickle.dumps(value))
                    Path(folder, f"{rank}.part").rename(Path(folder, str(rank)))
                os._exit(0)
            children.append(pid)
        until = time.monotonic() + seconds
        for pid in children:
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    break
                time.sleep(0.01)
        paths = [Path(folder, str(rank)) for rank in range(count)]
        return [pickle.loads(p.read_bytes()) if p.exists() else TimeoutError(f"{seconds} s") for p in paths]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    yield


def row(_: int, kind: str) -> tuple[dict[str, str], str]:
    """The cells of one model, and why it is refused."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        built(kind)
    except Exception as error:
        return {}, f"not built: {error}"
    why = ""
    try:
        on_ranks(kind, lambda model, group: None)
    except ValueError as error:
        why = f"{error}".split(": ", 1)[-1].split(". What passes")[0]
        return dict.fromkeys(CELLS, "refused"), why
    cells: dict[str, str] = {}
    for part in (trained, lambda kind: {"generation": generated(kind)}, lambda kind: {"packed": packed(kind)},
                 lambda kind: {"Trainer": by_trainer(kind)}):  # fmt: skip
        try:
            cells |= part(kind)
        except Exception as error:
            why += f" transformers alone: {type(error).__name__}: {error}".splitlines()[0][:110]
    return cells, why


def kinds() -> dict[str, str]:
    """Model type -> class, of all that AutoModelForCausalLM knows."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items() if kind in CONFIG_MAPPING}


def line(kind: str) -> str:
    (found,) = forked(row, 1, kind, seconds=TIMEOUT_S)
    cells, why = ({}, f"{type(found).__name__}: {found}") if isinstance(found, BaseException) else found
    shown = [cells.get(name, "-") for name in CELLS]
    return f"{kinds()[kind]:<36} " + " ".join(f"{x:<10}" for x in shown) + (f" {why.strip()[:260]}" if why else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all, if none is given")
    names = parser.parse_args().names or sorted(kinds())
    commit = subprocess.run(["git", "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=False)
    print(f"python tests/integrations/model_table.py, leetdist {commit.stdout.strip()}, transformers "
          f"{transformers.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    print(f"{RANKS} ranks, {TOKENS} tokens, fp32; exact: within {TOLERANCE:.0e} of one process, the largest value 1\n")
    print(f"{'':<36} " + " ".join(f"{name:<10}" for name in CELLS), flush=True)
    _ = transformers.Trainer, transformers.TrainingArguments, transformers.GenerationMixin  # or each fork imports them
    lines = []
    for name in names:
        lines.append(line(name))
        print(lines[-1], flush=True)
    count = {word: sum(text.count(f" {word}") for text in lines) for word in ("exact", "refused", "WRONG", "ERROR")}
    print("\ncells: " + ", ".join(f"{n} {word}" for word, n in count.items()))


if __name__ == "__main__":
    sys.exit(main())
