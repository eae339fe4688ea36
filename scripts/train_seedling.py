"""Train `seedling`, the small real Llama that ships inside the package, or a small mixture of experts.

    python scripts/train_seedling.py --text TRAIN.txt --valid VALID.txt --out FOLDER
    python scripts/train_seedling.py --architecture mixtral --tokens 6000000 ...

    torchrun --nproc-per-node 2 scripts/train_seedling.py ...      # a process a core, or a GPU

A byte-level BPE tokenizer is trained on the same text first. The run keeps a checkpoint in
`FOLDER/run` and goes on from it when started again, so it can be stopped at any time. The learning
rate stays constant until the last fifth, which has checkpoints of its own and twice as long windows:
a run with fewer `--tokens` can be finished first and a longer one goes on from where its constant part
ended. At the end the model is written to `FOLDER/seedling` in fp16, with a model card that states
tokens, seed, date and validation perplexity.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BOS = "<|endoftext|>"
VOCABULARY = 2048
SHORT_WINDOW, WINDOW = 128, 256
WARMUP_STEPS = 200
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 384, "num_hidden_layers": 6},
    "mixtral": {
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.01,
    },
    "olmoe": {
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "router_aux_loss_coef": 0.01,
    },
}
"""What differs from the shape that all share: hidden 128, 8 query and 4 KV heads."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="training text, a paragraph a line")
    parser.add_argument("--valid", type=Path, required=True, help="validation text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and the result")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--tokens", type=int, default=30_000_000, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=4096, help="tokens a step, over all processes")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 (where the hardware has it)")
    return parser.parse_args()


def train_tokenizer(text: Path, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 2,048 entries; every document starts with the one special token."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train([str(text)], trainer)
        folder.mkdir(parents=True, exist_ok=True)
        bpe.save(str(folder / "tokenizer.json"))
    bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=512
    )


def tokenise(text: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The whole file as one stream, paragraphs separated by a newline."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
    return np.fromiter((token for line in encoded for token in line), dtype=np.int64)


def build_model(architecture: str, seed: int) -> PreTrainedModel:
    """A fresh model; mixtures add the loss that balances their experts."""
    torch.manual_seed(seed)
    own = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
        output_router_logits="router_aux_loss_coef" in own,
        **own,
    )
    return AutoModelForCausalLM.from_config(config)


def batch_at(stream: np.ndarray, step: int, tokens: int, window: int, seed: int) -> torch.Tensor:
    """Windows of step `step`: a fixed permutation an epoch, so that a resumed run sees the same data."""
    windows, batch = (len(stream) - 1) // window, tokens // window
    epoch, position = divmod(step, windows // batch)
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(0, window))
    order = generator.permutation(windows - 1)[position * batch : (position + 1) * batch]
    rows = [stream[offset + w * window : offset + (w + 1) * window] for w in order]
    return torch.from_numpy(np.stack(rows))


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Warm up, stay, then fall linearly over the last fifth (the only part that depends on `steps`)."""
    start = decay_start(steps)
    if step < start:
        return peak * min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * max(0.02, (steps - step) / (steps - start))


def decay_start(steps: int) -> int:
    return steps - steps // 5


def share_gradients(model: PreTrainedModel) -> None:
    """The mean of the gradients of all processes, in one message."""
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in model.parameters()]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def perplexity(model: PreTrainedModel, stream: np.ndarray, device: str) -> float:
    """Mean next-token cross-entropy in non-overlapping windows of 256 tokens, exponentiated."""
    model.eval()
    total, count = 0.0, 0
    windows = torch.from_numpy(stream[: len(stream) // WINDOW * WINDOW].reshape(-1, WINDOW))
    for chunk in windows.split(32):
        chunk = chunk.to(device)
        plain = {"output_router_logits": False} if hasattr(model.config, "router_aux_loss_coef") else {}
        loss = model(input_ids=chunk, labels=chunk, use_cache=False, **plain).loss
        total += loss.item() * len(chunk)
        count += len(chunk)
    model.train()
    return math.exp(total / count)


def checkpoint_path(run: Path, step: int, steps: int) -> Path:
    return run / ("constant.pt" if step <= decay_start(steps) else f"decay-{steps}.pt")


def save_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, new)
    os.replace(new, path)


def load_checkpoint(run: Path, steps: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on from: the decay of this very plan if begun, else the constant part, else 0."""
    for path in (checkpoint_path(run, steps, steps), checkpoint_path(run, 0, steps)):
        if path.exists():
            saved = torch.load(path, map_location=model.device, weights_only=True)
            if saved["step"] > decay_start(steps) and path.name == "constant.pt":
                raise SystemExit(
                    f"{path} is at step {saved['step']}, past the constant part of this plan: raise --tokens"
                )
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            return saved["step"]
    return 0


def described(architecture: str) -> str:
    own = ", ".join(f"{key} {value}" for key, value in ARCHITECTURES[architecture].items())
    return f"{architecture}: hidden 128, 8 query and 4 KV heads, vocab {VOCABULARY}, tied, {own}"


PURPOSE = "A small real Llama that ships inside secateur so that every command runs offline."


def write_result(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    arguments: argparse.Namespace,
    tokens: int,
    valid_perplexity: float,
) -> None:
    if hasattr(model.config, "router_aux_loss_coef"):
        model.config.output_router_logits = False
    model.to("cpu", torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "architecture": described(arguments.architecture),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_tokens": tokens,
        "seed": arguments.seed,
        "date": datetime.date.today().isoformat(),
        "valid_perplexity": round(valid_perplexity, 3),
        "protocol": "non-overlapping windows of 256 tokens over the whole validation file, no special tokens",
        "torch": torch.__version__,
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    card = f"""---
license: apache-2.0
language: en
library_name: transformers
---
# {folder.name}

{PURPOSE if folder.name == "seedling" else "A small real mixture of experts."} It was trained from
scratch on public-domain fairy tales and children's books with `scripts/train_seedling.py`. It is made
for trying out pruning, not for reading.

| | |
|---|---|
{rows}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    arguments = parse_arguments()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if arguments.device.startswith("cuda") else "gloo")
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = f"cuda:{rank}" if arguments.device == "cuda" and processes > 1 else arguments.device
    run = arguments.out / "run"
    if rank == 0:
        train_tokenizer(arguments.text, run)
    if processes > 1:
        dist.barrier()
    tokenizer = train_tokenizer(arguments.text, run)
    train, valid = (tokenise(path, tokenizer) for path in (arguments.text, arguments.valid))
    model = build_model(arguments.architecture, arguments.seed).to(device).train()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.95), fused=True)
    steps = arguments.tokens // arguments.batch + 1
    step = load_checkpoint(run, steps, model, optimizer)
    started, first = time.time(), step
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, arguments.learning_rate)
        window = SHORT_WINDOW if step < decay_start(steps) else WINDOW
        ids = batch_at(train, step, arguments.batch, window, arguments.seed)
        ids = ids.tensor_split(processes)[rank].to(device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=arguments.bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        share_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if rank > 0:
            continue
        if step % 20 == 0:
            pace = (step - first) * arguments.batch / (time.time() - started)
            left = (steps - step) * arguments.batch / pace
            print(
                f"step {step}/{steps} loss {loss.item():.3f} {pace:,.0f} tokens/s, {left / 60:.0f} min left",
                flush=True,
            )
        if step % 100 == 0 or step in (steps, decay_start(steps)):
            save_checkpoint(checkpoint_path(run, step, steps), model, optimizer, step)
        if step % 1000 == 0:
            print(f"valid perplexity {perplexity(model, valid, device):.2f}", flush=True)
    if rank == 0:
        folder = arguments.out / ("seedling" if arguments.architecture == "llama" else arguments.architecture)
        tokens = step * arguments.batch
        write_result(folder, model, tokenizer, arguments, tokens, perplexity(model, valid, device))
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
