"""From the parameters of a model to the tensors of a GGUF file, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.model import Anatomy, Block, Shape
from secateur.checkpoint.reader import Checkpoint
from secateur.core.errors import ExportError
from secateur.formats.fit import NO_MLP, Fit
from secateur.formats.rope import rope_factors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entry", "entries", "neighbours"]

OUTER = {"embedding": "token_embd", "norm": "output_norm", "head": "output"}
PARTS = {"self_attn": ("self_attn.", "input_layernorm."), "mlp": ("mlp.", "post_attention_layernorm.")}
"""What a block without one of these parts has no use for."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name, its shape as torch has it, and how to get it."""

    name: str
    shape: Shape
    read: Callable[[], Tensor]


def entries(found: Fit, checkpoint: Checkpoint, anatomy: Anatomy, layout: FileLayout) -> list[Entry]:
    """Every tensor of the file in the order in which it is written; nothing is read before `Entry.read`.

    Raises:
        ExportError: a parameter that the file has no name for.
    """
    source = _Source(found, checkpoint, anatomy, layout)
    blocks = [entry for block in anatomy.blocks for entry in source.block(block)]
    return [*source.outer(), *source.frequencies(), *blocks]


def neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of query or key heads from `halves` to `neighbours`: what turns together comes to lie together.

    Args:
        weight: (heads * head_dim, ...).
    """
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class _Source:
    found: Fit
    checkpoint: Checkpoint
    anatomy: Anatomy
    layout: FileLayout

    def outer(self) -> Iterator[Entry]:
        """Embedding, last norm, and the head where it is a matrix of its own."""
        tied = f"{self.anatomy.head}.weight" in self.anatomy.tied
        for role, name in OUTER.items():
            if role == "head" and tied and self.found.architecture.tied:
                continue
            own = "embedding" if role == "head" and tied else role
            path = f"{getattr(self.anatomy, own)}.weight"
            yield self._entry(f"{name}.weight", self.anatomy.outer[path], self._outer_reader(path), path)

    def frequencies(self) -> Iterator[Entry]:
        factors = rope_factors(self.found.form.config, self.found.form.head_dim)
        if factors is not None:
            yield Entry("rope_freqs.weight", (len(factors),), lambda: _tensor(factors))

    def block(self, block: Block) -> Iterator[Entry]:
        skipped = self.found.form.skipped[block.index]
        gone = tuple(start for part in skipped for start in PARTS[part])
        for name, shape in block.parameters.items():
            if not (gone and name.startswith(gone)):
                yield from self._parameter(block, name, shape)
        if skipped:
            yield from self._silent(block.index, skipped)

    def _parameter(self, block: Block, name: str, shape: Shape) -> Iterator[Entry]:
        path, kind = _path_and_kind(name)
        targets = self.found.family.parts(path)
        if not targets:
            raise ExportError(f"{block.prefix}.{name} has no place in a GGUF file", "", "report this model")
        for target, (dimension, start, stop) in zip(targets, _pieces(block, name, len(targets)), strict=True):
            size = (*shape[:dimension], stop - start, *shape[dimension + 1 :])
            read = self._block_reader(block.index, name, dimension, start, stop)
            yield self._entry(f"blk.{block.index}.{target}.{kind}", size, read, path)

    def _silent(self, index: int, skipped: frozenset[str]) -> Iterator[Entry]:
        """Zeros where llama.cpp insists on a part that the block does not have."""
        hidden, width = self.found.form.hidden, self.found.form.head_dim
        shapes: dict[str, Shape] = {}
        heads, shared = self.found.heads(index)
        if "self_attn" in skipped and heads:
            shapes |= {"attn_norm": (hidden,), "attn_q": (heads * width, hidden)}
            shapes |= {"attn_k": (shared * width, hidden), "attn_v": (shared * width, hidden)}
            shapes |= {"attn_output": (hidden, heads * width)}
        if "mlp" in skipped:
            shapes |= {"ffn_norm": (hidden,), "ffn_gate": (NO_MLP, hidden), "ffn_up": (NO_MLP, hidden)}
            shapes |= {"ffn_down": (hidden, NO_MLP)}
        for name, shape in shapes.items():
            yield Entry(f"blk.{index}.{name}.weight", shape, _zeros(shape))

    def _entry(self, name: str, shape: Shape, read: Callable[[], Tensor], path: str) -> Entry:
        found = self.found
        target = name.split(".")[-2]
        if found.architecture.rotary == "neighbours" and target in ("attn_q", "attn_k"):
            return Entry(name, shape, lambda: neighbours(read(), found.form.head_dim))
        if found.family.plus_one and "norm" in path:
            return Entry(name, shape, lambda: read().float() + 1)
        return Entry(name, shape, read)

    def _block_reader(
        self, index: int, name: str, dimension: int, start: int, stop: int
    ) -> Callable[[], Tensor]:
        def read() -> Tensor:
            files = self.layout.files_of(index, name)
            whole = self.layout.assemble_one(index, name, self.checkpoint.read(files))
            return whole.narrow(dimension, start, stop - start)

        return read

    def _outer_reader(self, path: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            tied = {path, *(alias for alias, known in self.anatomy.tied.items() if known == path)}
            names = [name for name in self.layout.outer_files() if name in tied]
            files = [file for name in names[:1] for file in self.layout.outer_files()[name]]
            return self.layout.assemble_outer(self.checkpoint.read(files))[path]

        return read


def _path_and_kind(name: str) -> tuple[str, str]:
    """`self_attn.q_proj.bias` -> path and kind; parameters of experts are weights without saying so."""
    path, _, kind = name.rpartition(".")
    return (path, kind) if kind in ("weight", "bias") else (name, "weight")


def _pieces(block: Block, name: str, count: int) -> list[tuple[int, int, int]]:
    """Dimension, start and stop of the tensors that a parameter becomes."""
    axes = block.axes[name]
    if count == 1:
        return [(0, 0, axes[0].size)]
    dimension = next(place for place, axis in enumerate(axes) if len(axis.segments) == count)
    stops = list(accumulate(segment.size for segment in axes[dimension].segments))
    return [(dimension, start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _tensor(values: list[float]) -> Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32)


def _zeros(shape: Shape) -> Callable[[], Tensor]:
    def read() -> Tensor:
        import torch

        return torch.zeros(shape)

    return read
