"""Train a language model on sequences that no single GPU holds. Copy this file and change it.

    leetdist train --text book.txt
    torchrun --nproc-per-node 8 -m leetdist.launch.train --text books/ --sequence-parallel 4 --tokens 1048576
    accelerate launch --config_file launch/configs/fsdp2.yaml launch/train.py --text books/ --sequence-parallel 4
    deepspeed --num_gpus 8 launch/train.py --deepspeed-config launch/configs/zero3.json --text books/

The same script runs under each launcher; accelerate is what talks to DDP, FSDP2 and DeepSpeed. What makes it train on
sharded sequences is marked with (1) to (5); all else is an ordinary training loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, InitProcessGroupKwargs
from accelerate.utils import DistributedType, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leetdist
from leetdist.integrations import checkpoint
from leetdist.launch import commands
from leetdist.launch.commands import PRESETS
from leetdist.launch.model import Config, LanguageModel
from leetdist.launch.progress import Progress
from leetdist.launch.ranks import is_launched, start
from leetdist.launch.resume import described, differences
from leetdist.launch.runtime import one_message
from leetdist.launch.text import Windows, load_tokens

KINDS = {DistributedType.FSDP: "FSDP2", DistributedType.DEEPSPEED: "DeepSpeed"}  # else DDP


def make_accelerator(options: argparse.Namespace) -> Accelerator:
    """accelerate, however we were launched; on a machine without a GPU over gloo."""
    cuda, several = torch.cuda.is_available(), asked_for_several()
    how: dict[str, Any] = {"mixed_precision": options.precision}
    if options.precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ and cuda:
        how["mixed_precision"] = "bf16"
    if options.deepspeed_config:
        if not Path(options.deepspeed_config).is_file():
            raise SystemExit(f"--deepspeed-config {options.deepspeed_config}: no such file")
        how["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=options.deepspeed_config)
        how["kwargs_handlers"] = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")]
    elif not cuda and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        how["cpu"] = True
    if options.fsdp:
        how["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            # A transformers model names its own.
            transformer_cls_names_to_wrap=["Block"] if options.model in PRESETS else None,
            state_dict_type="SHARDED_STATE_DICT",
        )
    if importlib.util.find_spec("tensorboard"):
        how["log_with"] = "tensorboard"
    accelerator = Accelerator(project_dir=options.out, **how)
    if accelerator.num_processes != dist.get_world_size():  # accelerate then trains that many models, and says nothing
        raise SystemExit(
            f"accelerate sees {accelerator.num_processes} of {dist.get_world_size()} processes: see launch/README.md"
        )
    if several:
        accelerator.print(
            "accelerate launch was asked for several processes and started one, as it does on a CPU and without "
            "--multi_gpu: this trains on one rank. torchrun starts several, and so does --ranks"
        )
    fsdp = options.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp and accelerator.distributed_type != DistributedType.FSDP:
        accelerator.print("accelerate has FSDP2 on GPUs only: this is DDP")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = options.micro_batch
        config["gradient_clipping"] = options.clip
        if options.compile and accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise SystemExit(
                "--compile: torch.compile finds no weights where ZeRO 3 has parted them; --fsdp, or ZeRO 1, 2"
            )
    return accelerator


def asked_for_several() -> bool:
    """Whether `accelerate launch` started one process where it was asked for more: it then names a master, and no
    ranks."""
    return {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ


def make_model(options: argparse.Namespace, vocabulary: int) -> nn.Module:
    if options.model in PRESETS:
        return LanguageModel(Config.preset(options.model, vocabulary), checkpointing=options.checkpointing)
    from transformers import AutoModelForCausalLM

    if not Path(options.model).is_dir() and os.environ.get("RANK", "0") == "0":
        print(f"--model {options.model}: none of {', '.join(PRESETS)}, and no folder: asking Hugging Face", flush=True)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def compile_blocks(model: nn.Module) -> None:
    """In place, so that checkpoints keep their names. A model's blocks are alike, and one graph serves all of them; DDP
    sends the gradients of one while the next is computed, without graphs that are cut at its buckets."""
    torch._dynamo.config.optimize_ddp = False
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    for block in max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())):
        block.compile(dynamic=False)


def logits_of(model: nn.Module, batch: dict[str, Tensor], options: argparse.Namespace) -> Tensor:
    """(rows, tokens, vocabulary) of this rank's shard."""
    if options.model in PRESETS:
        return model(batch["input_ids"])
    # transformers' models need the positions in the whole sequence.
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to a tenth; from the step alone, so there is nothing to save."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def main(argv: list[str] | None = None) -> int:
    begin, options = time.monotonic(), commands.train().parse_args(argv)
    if options.processes is not None and not is_launched():  # as a script; `leetdist train` does it before
        return start(options.processes, ["train", *(sys.argv[1:] if argv is None else argv)])
    joined_before = dist.is_initialized()
    with one_message():
        mesh = leetdist.device_mesh(options.sequence_parallel or None)  # (1) data parallel x sequence parallel
        accelerator = make_accelerator(options)
        set_seed(options.seed)
        data_ranks = mesh["dp"].size()
        options.batch = options.batch or data_ranks * options.micro_batch
        micro_batches, left = divmod(options.batch, data_ranks * options.micro_batch)
        if left or not micro_batches:
            raise SystemExit(f"--batch {options.batch} must be a multiple of {data_ranks} x --micro-batch")
        accelerator.gradient_accumulation_steps = micro_batches

        tokens, vocabulary = load_tokens(options.text, options.tokenizer)
        windows = Windows(tokens, options.tokens)
        rows = DataLoader(windows, batch_size=options.batch, shuffle=True, drop_last=True)
        loader = leetdist.ShardedLoader(rows, mesh, seed=options.seed, device=accelerator.device)  # (2) batches
        if not len(loader):
            raise SystemExit(f"the text has {len(windows)} sequences of {options.tokens} tokens: fewer than a batch")
        model = leetdist.parallelize(make_model(options, vocabulary), mesh)  # (3) before DDP, FSDP2 or DeepSpeed
        if options.compile:
            compile_blocks(model)

    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress(options, accelerator)
    accelerator.register_for_checkpointing(loader, progress)

    with ExitStack() as running:
        with one_message():
            running.enter_context(checkpoint.sole_user(options.out))
            about = described(options, tokens)
            resumed = resume(accelerator, about, options) if options.resume else None
        kind = KINDS.get(accelerator.distributed_type, "DDP")
        further = f", from step {progress.step}" if resumed else ""
        ranks = "1 rank" if mesh.size() == 1 else f"{mesh.size()} ranks, {mesh['sp'].size()} a sequence, {kind}"
        progress.begin(
            f"{parameters / 1e6:.1f}M parameters, {len(tokens):,} tokens of text, {options.batch} x "
            f"{options.tokens:,} a step; {ranks}, {accelerator.device}{further}"
        )
        saved = resumed if progress.step >= options.steps else None  # nothing is left to train
        while progress.step < options.steps:
            for batch in loader:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(progress.step, options)
                loss, norm = train_step(accelerator, model, optimizer, batch, mesh, micro_batches, options)
                progress.advance(loss, norm)
                last = progress.step == options.steps or out_of_time(begin, options.seconds, accelerator.device)
                now = options.save_every and not progress.step % options.save_every
                if options.save_every >= 0 and (last or now):
                    saved = checkpoint.write_atomically(options.out, progress.step, accelerator.save_state, about=about)
                if last:
                    options.steps = progress.step
                    break
        progress.end()
        accelerator.print(closing(saved, options), flush=True)
    if not joined_before:
        if mesh.size() > 1:
            dist.barrier()  # without it, 5 of 160 runs aborted when the first rank left
        dist.destroy_process_group()
    return 0


def resume(accelerator: Accelerator, about: dict[str, Any], options: argparse.Namespace) -> Path | None:
    """Load the newest whole checkpoint, if there is one, and say what goes on otherwise than before."""
    newest = checkpoint.latest(options.out, together=True)
    if newest is None:
        return None
    _, path = newest
    checkpoint.check(path, options.trust)
    for words in differences(checkpoint.about(path), about, options.changed, path):
        accelerator.print(f"not as before: {words}", flush=True)
    accelerator.load_state(str(path))
    return path


def closing(saved: Path | None, options: argparse.Namespace) -> str:
    """Where the run is now, and what to do with it."""
    figures = f"metrics: {options.out / 'metrics.jsonl'}"
    if saved is None:
        return f"nothing saved (--save-every {options.save_every}); {figures}"
    tokenizer = ["--tokenizer", options.tokenizer] if options.tokenizer else []
    further = commands.command("generate", "--model", options.out, *tokenizer, "--prompt", "Once upon a time")
    if options.model not in PRESETS:
        further = "the same command with --resume and more --steps goes on"
    return f"saved: {saved}; {figures}\n{further}"


def out_of_time(begin: float, seconds: float | None, device: torch.device) -> bool:
    """Whether the first rank's clock says so: all ranks must stop after the same step."""
    if seconds is None:
        return False
    late = torch.tensor(time.monotonic() - begin > seconds, device=device)
    dist.broadcast(late, 0)
    return bool(late)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    mesh: Any,
    micro_batches: int,
    options: argparse.Namespace,
) -> tuple[Tensor, Tensor | float]:
    """One step over all micro-batches: the mean loss over all ranks, and the norm of the gradient."""
    parts = [
        {name: x[rows] if len(x) > 1 else x for name, x in batch.items()}
        for rows in torch.arange(len(batch["input_ids"])).chunk(micro_batches)
    ]
    counted = (batch["shift_labels"] != -100).sum()
    total = leetdist.reduce_loss(counted.double(), 1, mesh, total_tokens=1)  # over all ranks
    mean = torch.zeros((), device=accelerator.device)
    norm: Tensor | float = 0.0
    for part in parts:
        with accelerator.accumulate(model):
            logits, labels = logits_of(model, part, options), part["shift_labels"]  # (4) labels are shifted already
            loss_sum = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            # (5) the mean over every rank's labels; times micro_batches, by which accelerate divides
            loss = leetdist.reduce_loss(loss_sum, (labels != -100).sum(), mesh, total_tokens=total)
            accelerator.backward(loss * micro_batches)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            optimizer.zero_grad()
            mean += loss.detach()
    return mean, norm


if __name__ == "__main__":
    sys.exit(main())
