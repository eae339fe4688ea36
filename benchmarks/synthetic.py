"""Write a bf16 checkpoint of any size, shard by shard, with a tokenizer that works: Llama, or Qwen3-MoE.

The weights are noise, so the model speaks no language; speed and memory do not care. What pruning does care
about is there: a few input columns and a few hidden channels are far larger than the rest, as in trained
models. At most one shard is in memory.

    python benchmarks/synthetic.py OUT --preset 5gb
    python benchmarks/synthetic.py OUT --hidden 512 --ffn 1408 --blocks 4 --heads 8 --kv-heads 4
    python benchmarks/synthetic.py OUT --preset 27gb-moe --blocks 4
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

__all__ = ["PRESETS", "Shape", "train_tokenizer", "write_checkpoint"]

BYTES_PER_PARAMETER = 2
END = "<|endoftext|>"
OUTLIER_FRACTION = 0.004
OUTLIER_FACTOR = 8.0
STRIP_LENGTH = 20_000_003
SENTENCES = (
    "The gardener walks along the wall and looks at every branch before she takes out her knife.",
    "A tree that is never cut grows wild, bears small fruit, and breaks under its own weight in a storm.",
    "What she takes away this winter decides what will grow next summer; nobody sees it but the tree.",
    "\"How do you know which branch to cut?\" asked the boy. \"I look for the one that does the least.\"",
    "They counted 17 apples on the first tree, 204 on the second, and only 3 on the one beside the gate.",
    "Old wood holds the tree up. Young wood feeds it. Dead wood does neither, and goes first.",
    "When the rain came they went inside, sharpened the blades, oiled the hinges, and waited for the frost.",
    "By spring the cuts had closed, the buds had opened, and the tree stood lighter than for years.",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `parameters` counts all of its weights.

    With `experts` it is a mixture of that many in every block, `ffn` wide each, of which a token visits
    `visited`.
    """

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 0
    visited: int = 0

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(f"{self}: heads of even width must divide hidden, and kv_heads heads")
        if self.visited > self.experts or bool(self.visited) != bool(self.experts):
            raise ValueError(f"{self}: a token of a mixture visits from one to all of the experts")

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def parameters(self) -> int:
        return sum(math.prod(size) for _, size in tensor_shapes(self))


PRESETS = {
    "1024": Shape(hidden=1024, ffn=2816, blocks=8, heads=16, kv_heads=16, vocab=4096),
    "5gb": Shape(hidden=2048, ffn=8192, blocks=36, heads=16, kv_heads=16, vocab=32000),
    "7b": Shape(hidden=4096, ffn=11008, blocks=32, heads=32, kv_heads=32, vocab=32000),
    "27gb-moe": Shape(
        hidden=2048, ffn=768, blocks=22, heads=32, kv_heads=4, vocab=32000, experts=128, visited=8
    ),
}
SIZES = tuple(field.name for field in fields(Shape))


def write_checkpoint(
    out: Path, shape: Shape, *, shard_bytes: int = 1_000_000_000, seed: int = 0, text: str = ""
) -> None:
    """Write config, tokenizer and shards into `out`, which must be empty or absent.

    Args:
        shard_bytes: largest shard, and about the memory this needs.
        text: what the tokenizer is trained on; a few built-in sentences when empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out} is not empty; choose another folder")
    tokenizer = train_tokenizer(text or "\n".join(SENTENCES), shape.vocab)
    tokenizer.save_pretrained(out)
    build_config(shape, tokenizer).save_pretrained(out)
    shards = split_into_shards(shape, shard_bytes)
    noise = Noise(seed)
    for number, sizes in enumerate(shards, 1):
        write_shard(out / shard_name(number, len(shards)), sizes, shape, noise)
    if len(shards) > 1:
        write_index(out, shape, shards)


def train_tokenizer(text: str, vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab` entries: any text can be encoded, text like `text` shortest."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def build_config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    shared = {
        "dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if not shape.experts:
        return LlamaConfig(architectures=["LlamaForCausalLM"], intermediate_size=shape.ffn, **shared)
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=shape.head_width,
        moe_intermediate_size=shape.ffn,
        num_experts=shape.experts,
        num_experts_per_tok=shape.visited,
        norm_topk_prob=True,
        **shared,
    )


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors, in the order of the model."""
    hidden, kv_width = shape.hidden, shape.kv_heads * shape.head_width
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for index in range(shape.blocks):
        prefix = f"model.layers.{index}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (kv_width, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (kv_width, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        if shape.experts:
            yield f"{prefix}self_attn.q_norm.weight", (shape.head_width,)
            yield f"{prefix}self_attn.k_norm.weight", (shape.head_width,)
            yield f"{prefix}mlp.gate.weight", (shape.experts, hidden)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        experts = [f"experts.{expert}." for expert in range(shape.experts)]
        for part in experts or [""]:
            yield f"{prefix}mlp.{part}gate_proj.weight", (shape.ffn, hidden)
            yield f"{prefix}mlp.{part}up_proj.weight", (shape.ffn, hidden)
            yield f"{prefix}mlp.{part}down_proj.weight", (hidden, shape.ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape.vocab, hidden)


def split_into_shards(shape: Shape, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Consecutive tensors of at most `shard_bytes` together (one larger tensor is a shard of its own)."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, size in tensor_shapes(shape):
        nbytes = math.prod(size) * BYTES_PER_PARAMETER
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = size
        used += nbytes
    return shards


class Noise:
    """A long strip of normal noise; every tensor is a stretch of it from a random place on.

    Drawing every one of billions of values would take most of the time of writing them.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.strip = torch.randn(STRIP_LENGTH, generator=self.generator)

    def stretch(self, size: tuple[int, ...]) -> Tensor:
        wanted = math.prod(size)
        start = int(torch.randint(STRIP_LENGTH, (), generator=self.generator))
        pieces = [self.strip[start : start + wanted]]
        wanted -= len(pieces[0])
        while wanted > 0:
            pieces.append(self.strip[:wanted])
            wanted -= len(pieces[-1])
        return torch.cat(pieces).view(size)

    def scales(self, width: int) -> Tensor:
        """1 for most of the columns and much more for a few."""
        outliers = torch.rand(width, generator=self.generator) < OUTLIER_FRACTION
        return torch.where(outliers, OUTLIER_FACTOR, 1.0)


def write_shard(file: Path, sizes: dict[str, tuple[int, ...]], shape: Shape, noise: Noise) -> None:
    tensors = {name: draw(name, size, shape, noise) for name, size in sizes.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def draw(name: str, size: tuple[int, ...], shape: Shape, noise: Noise) -> Tensor:
    """Noise of standard deviation 0.02 (smaller where it adds to the residual stream) with outliers."""
    values, scales = noise.stretch(size), noise.scales(size[-1])
    if len(size) == 1:
        return (scales * (0.5 + 0.1 * values)).bfloat16()
    deviation = 0.02
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation /= math.sqrt(2 * shape.blocks)
    return values.mul_(scales * deviation).bfloat16()


def shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def write_index(out: Path, shape: Shape, shards: list[dict[str, tuple[int, ...]]]) -> None:
    weight_map = {
        name: shard_name(number, len(shards)) for number, names in enumerate(shards, 1) for name in names
    }
    total = {"total_parameters": shape.parameters, "total_size": shape.parameters * BYTES_PER_PARAMETER}
    index = {"metadata": total, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, empty or absent")
    parser.add_argument("--preset", choices=PRESETS, default="1024", help="sizes to start from")
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, help=f"{size} instead of the preset's")
    parser.add_argument("--shard-gb", type=float, default=1.0, help="largest shard in gigabytes")
    parser.add_argument("--text", type=Path, help="text to train the tokenizer on")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    asked = {size: getattr(arguments, size) for size in SIZES if getattr(arguments, size) is not None}
    shape = replace(PRESETS[arguments.preset], **asked)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else ""
    shard_bytes = int(arguments.shard_gb * 1e9)
    write_checkpoint(arguments.out, shape, shard_bytes=shard_bytes, seed=arguments.seed, text=text)
    size_bytes = shape.parameters * BYTES_PER_PARAMETER
    print(f"{arguments.out}: {shape.parameters:,} parameters, {size_bytes:,} bytes")


if __name__ == "__main__":
    main()
