"""A thinner residual stream: find a basis at every place in one walk, and write each block in its bases.

The dense blocks run as they are, on signals projected onto the directions that stay at every place passed so
far: that is what the sliced model computes, seen in the old basis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.anatomy.layout import FileLayout
from secateur.anatomy.resized import resized_config
from secateur.anatomy.resolve import resolve_config
from secateur.anatomy.sliced import FLAG, shortcuts_of, sliced_flag, sliced_shapes, sliced_size
from secateur.anatomy.stream import stream_of
from secateur.calibration.activations import Batch
from secateur.calibration.driver import OpenBlock
from secateur.calibration.observers import Gram
from secateur.core.errors import RecipeError
from secateur.core.numerics import exact_products
from secateur.pipeline.matrices import generator_for
from secateur.pipeline.opened import Opened
from secateur.pipeline.plans.sizes import FileSizes, sizes_of
from secateur.pipeline.state import Outcome, Run
from secateur.recipe import Recipe
from secateur.report.model import Block, Layer
from secateur.structure.base import SliceMethod
from secateur.structure.rotation import lost_energy, rotate_block, turned, written_in

__all__ = ["check_slices", "prune_slices", "slice_sizes"]

NOTES = ("lost_after_attention", "lost_after_feed_forward")
LOADING = "Blocks have shortcut matrices: load it after `import secateur`, or with trust_remote_code=True."


def check_slices(opened: Opened, method: SliceMethod, recipe: Recipe) -> None:
    """Refuse, before anything is read or written, what could not be done.

    Raises:
        RecipeError: a share that no width makes.
        AnatomyError: a model whose residual stream cannot be rotated.
    """
    if recipe.scores is not None:
        raise RecipeError(
            f"scores with method {method.id!r}", "a method that ranks single units", "leave --scores out"
        )
    _Slices(opened, method, recipe.resolved_sparsity)


def slice_sizes(opened: Opened, method: SliceMethod, recipe: Recipe) -> FileSizes:
    """What the run will write: tied heads come out untied."""
    slices = _Slices(opened, method, recipe.resolved_sparsity)
    return sizes_of(opened, slices.layout, slices.sparsity)


def prune_slices(run: Run, method: SliceMethod) -> Outcome:
    """Write all blocks, the embedding and the head in bases of the width that the sparsity comes to."""
    slices = _Slices(run.opened, method, run.recipe.resolved_sparsity)
    walk = _Walk(run, method, slices)
    layers, blocks = walk.walk()
    return Outcome(
        layers=layers,
        blocks=blocks,
        sparsity=slices.sparsity,
        config_updates=slices.config_updates,
        dropped=slices.dropped,
        outer=walk.outer_files,
        warnings=[slices.told, LOADING],
    )


class _Slices:
    """How wide the sliced model is, and its files.

    Attributes:
        wide, width: of the residual stream before and after.
        last: what the last block writes.
        sparsity: fraction of the parameters in blocks that goes, shortcuts counted.
        shortcut_share: what the shortcuts are of the parameters in blocks before.
        config_updates: keys of config.json that change.
        layout: of the new files.
        dropped: tensors of the source that are gone.
    """

    def __init__(self, opened: Opened, method: SliceMethod, sparsity: float) -> None:
        self.opened, self.anatomy = opened, opened.anatomy
        self.stream = stream = stream_of(opened.config, opened.anatomy)
        if method.slice_head and f"{opened.anatomy.norm}.weight" not in opened.anatomy.outer:
            raise RecipeError("slice_head with a last norm without weights", "", "leave slice_head out")
        anatomy, self.wide, whole = self.anatomy, self.anatomy.spaces["hidden"], self.anatomy.block_parameters
        widths = range(method.round_to, self.wide, method.round_to)

        def share(width: int) -> float:
            return 1 - sliced_size(anatomy, stream, width, width if method.slice_head else self.wide) / whole

        possible = [width for width in widths if share(width) > 0]
        if not possible or not share(possible[-1]) / 2 <= sparsity <= share(possible[0]):
            shares = f"{share(possible[-1]):.3f} to {share(possible[0]):.3f}" if possible else "none"
            raise RecipeError(
                f"sparsity {sparsity:g} by slices in multiples of {method.round_to}",
                f"{shares}, since shortcut matrices come on top",
                "choose another --sparsity, or -O round_to=1",
            )
        self.width = min(possible, key=lambda width: abs(share(width) - sparsity))
        self.last = self.width if method.slice_head else self.wide
        self.sparsity = share(self.width)
        count = len(anatomy.blocks) * len(stream.steps)
        extra = count * self.width**2 + (self.last - self.width) * self.width
        self.shortcut_share = extra / whole
        self._settle(method)

    @property
    def told(self) -> str:
        """What went of the hidden size and what of the parameters, in words."""
        gone = 1 - self.width / self.wide
        return (
            f"{gone:.1%} of the hidden size went ({self.width} of {self.wide} stay) for {self.sparsity:.1%} "
            f"of the parameters in blocks: shortcut matrices put back {self.shortcut_share:.1%}."
        )

    def written(self, index: int) -> int:
        """What block `index` writes."""
        return self.last if index == len(self.anatomy.blocks) - 1 else self.width

    def _settle(self, method: SliceMethod) -> None:
        anatomy, checkpoint, blocks, stream = (
            self.anatomy,
            self.opened.checkpoint,
            self.anatomy.blocks,
            self.stream,
        )
        sizes = [{"stream": self.width, "output": self.written(block.index)} for block in blocks]
        shapes = [
            sliced_shapes(stream, block, *own.values()) for block, own in zip(blocks, sizes, strict=True)
        ]
        flag = sliced_flag(anatomy, stream, slice_head=method.slice_head)
        extra = {FLAG: flag, "tie_word_embeddings": False}
        biases = stream.new_biases(blocks[0])
        self.config_updates = resized_config(checkpoint.config, anatomy, sizes, shapes, biases, extra=extra)
        self.dropped = self._gone(method.slice_head)
        made = self._made(biases) + ([f"{anatomy.head}.bias"] if flag["head_bias"] else [])
        names = [name for name in (*checkpoint.tensors, *made) if name not in self.dropped]
        resolved = resolve_config({**checkpoint.config, **self.config_updates})
        self.layout = FileLayout(resolved, dict.fromkeys(names))

    def _gone(self, slice_head: bool) -> frozenset[str]:
        """Names on disk of the norms that are in the matrices now."""
        layout, stream, last = self.opened.layout, self.stream, self.anatomy.norm
        norms = tuple(f".{norm}.{kind}" for norm in stream.norms for kind in ("weight", "bias"))
        inside = (name for block in self.anatomy.blocks for name in layout.block_names(block.index))
        gone = {name for name in inside if name.endswith(norms)}
        if slice_head:
            ends = (f"{last}.weight", f"{last}.bias")
            gone |= {name for name in layout.outer_names() if any(end.endswith(name) for end in ends)}
        return frozenset(gone)

    def _made(self, biases: Sequence[str]) -> list[str]:
        """Names on disk of what is new: shortcuts, biases, and a head that was tied."""
        head = f"{self.anatomy.head}.weight"
        added = [*shortcuts_of(len(self.stream.steps)), *(f"{name}.bias" for name in biases)]
        names = [head] if head in self.anatomy.tied else []
        for block in self.anatomy.blocks:
            first = self.stream.writers(block)[0].parameter
            stored = self.opened.layout.block_names(block.index)
            prefix = next(name for name in stored if name.endswith(f".{first}")).removesuffix(first)
            names += [prefix + name for name in added]
        return names


class _Walk:
    """The one pass over the blocks. Every basis is kept beside the parts, so that a resumed run finds it and
    only runs the blocks again."""

    def __init__(self, run: Run, method: SliceMethod, slices: _Slices) -> None:
        self.run, self.method, self.slices = run, method, slices
        self.anatomy = run.opened.anatomy
        self._entering = torch.empty(0)
        self._first: Tensor | None = None

    def walk(self) -> tuple[list[Layer], list[Block]]:
        """Write block after block; those of an interrupted run are done."""
        layers, blocks, done = list[Layer](), list[Block](), self.run.finished()
        driver = self.run.driver()
        with self.run.progress.task(f"slicing with {self.method.id}", len(self.anatomy.blocks)) as task:
            for opened in driver.blocks(outputs=self.method.slice_head):
                record = self._slice(opened, opened.index in done)
                record = done.get(opened.index, record)
                layers.append(Layer.model_validate(record["layer"]))
                blocks.append(Block.model_validate(record["block"]))
                task.advance()
        return layers, blocks

    def outer_files(self, files: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embedding and head in the bases of the first and the last place, by their names on disk."""
        anatomy = self.anatomy
        whole = self.run.opened.layout.assemble_outer(files)
        first, last = self._kept("0-entering")["basis"], self._entering.cpu()
        new, head = dict(whole), f"{anatomy.head}.weight"
        for path in self.slices.stream.embeddings:
            own = whole[f"{path}.weight"]
            written = written_in(first, self.slices.stream.centred)
            new[f"{path}.weight"] = (own.double() @ written).to(own.dtype)
        if self.method.slice_head:
            own = whole[head]
            folded = own.double() * new.pop(f"{anatomy.norm}.weight").double()
            new[head] = (folded @ last).to(own.dtype)
            if (bias := new.pop(f"{anatomy.norm}.bias", None)) is not None:
                new[f"{anatomy.head}.bias"] = (own.double() @ bias.double()).to(own.dtype)
        return self.slices.layout.disassemble_outer(new)

    def _slice(self, opened: OpenBlock, done: bool) -> dict[str, Any]:
        started, index = time.perf_counter(), opened.index
        last, stream = index == len(self.anatomy.blocks) - 1, self.slices.stream
        if index == 0:
            self._entering = self._basis("0-entering", opened.inputs)["basis"]
        between = [step[0][0] for step in stream.steps[1:]]
        bridge = _Bridge(opened.module, between, self._entering)
        places = [{"basis": self._entering}]
        with bridge.installed():
            for norm in between:
                places.append(self._basis(f"{index}-between", partial(opened.reaching, norm)))
                bridge.cross_in(places[-1]["basis"])
            if last and not self.method.slice_head:
                opened.finish()
                leaving = {"basis": torch.eye(self.slices.wide, dtype=torch.float64), "lost": torch.zeros(())}
            else:
                leaving = self._leaving(opened)
        places.append(leaving)
        device = opened.parameters[opened.block.matrices[0].parameter].device
        bases = [place["basis"].to(device) for place in places]
        self._entering = leaving["basis"]
        record = {
            "layer": self._row(index, [float(place["lost"]) for place in places[1:]]).model_dump(mode="json"),
            "block": Block(block=index, seconds=round(time.perf_counter() - started, 4)).model_dump(
                mode="json"
            ),
        }
        if not done:
            stored, _ = self.run.as_stored(opened)
            whole = self.run.opened.layout.assemble(index, stored)
            new = rotate_block(opened.block, stream, {n: t.to(device) for n, t in whole.items()}, bases)
            self.run.keep(index, self.slices.layout.disassemble(index, new), record)
        return record

    def _leaving(self, opened: OpenBlock) -> dict[str, Tensor]:
        """The basis of what leaves the block, which is then run on all windows."""
        gram = self._gram()

        def watch(batch: Batch, before: Tensor, after: Tensor) -> None:
            self._add(gram, batch.real(after))

        def find() -> dict[str, Tensor]:
            opened.finish(watch)
            return self._principal(gram, name)

        name = f"{opened.index}-leaving"
        found = self.run.remembered(find, _file(name))
        if not opened.finished:
            opened.finish()
        return found

    def _basis(self, name: str, rows: Callable[[], Iterable[Tensor]]) -> dict[str, Tensor]:
        def find() -> dict[str, Tensor]:
            gram = self._gram()
            for part in rows():
                self._add(gram, part)
            return self._principal(gram, name)

        return self.run.remembered(find, _file(name))

    def _kept(self, name: str) -> dict[str, Tensor]:
        return self.run.remembered(dict, _file(name))

    def _gram(self) -> Gram:
        return Gram(self.slices.wide, self.run.device)

    def _add(self, gram: Gram, rows: Tensor) -> None:
        """What the norms see of these rows."""
        rows = rows.float()
        with exact_products():
            gram.add(rows - rows.mean(-1, keepdim=True) if self.slices.stream.centred else rows)

    def _principal(self, gram: Gram, name: str) -> dict[str, Tensor]:
        if self.run.group is not None:
            for tensor in gram.sums:
                self.run.group.all_reduce(tensor)
        covariance, wide = gram.take(torch.float64), self.slices.wide
        mean = (
            covariance.trace() / wide**2 if self.slices.stream.centred else 0
        )  # nothing is in it: it comes last
        basis = self.method.directions(covariance - mean)[:, : self.slices.width].contiguous()
        lost = lost_energy(covariance, basis)
        if self.method.orientation == "random":
            basis = turned(basis, generator_for(self.run.recipe.seed, name))
        return {"basis": basis.cpu().contiguous(), "lost": torch.tensor(lost, dtype=torch.float64)}

    def _row(self, index: int, lost: list[float]) -> Layer:
        slices = self.slices
        return Layer(
            block=index,
            matrix="hidden",
            rows=slices.wide,
            columns=self.anatomy.blocks[index].size // slices.wide,
            sparsity_requested=self.run.recipe.resolved_sparsity,
            sparsity=1 - slices.width / slices.wide,
            notes=dict(zip(NOTES[-len(lost) :], lost, strict=True)),
        )


class _Bridge:
    """Projects what a dense block reads, and what it carries from its first half to its second, which begins
    at a norm (none in a block whose halves read the same)."""

    def __init__(self, module: nn.Module, norms: Sequence[str], entering: Tensor) -> None:
        self.module, self.norms = module, norms
        self._entering = self._own(entering)
        self._between: Tensor | None = None
        self._gone: Tensor | None = None

    def cross_in(self, between: Tensor) -> None:
        """From now on the second half reads, and the block carries on, what this basis keeps."""
        self._between = self._own(between)

    def _own(self, basis: Tensor) -> Tensor:
        weight = next(self.module.parameters())
        return basis.to(weight.device, weight.dtype)

    @contextmanager
    def installed(self) -> Iterator[None]:
        hooks = [
            self.module.register_forward_pre_hook(self._enter, with_kwargs=True),
            *(self.module.get_submodule(n).register_forward_pre_hook(self._cross) for n in self.norms),
            self.module.register_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_projected(args[0], self._entering), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _projected(kwargs["hidden_states"], self._entering)}

    def _cross(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._between is None:
            return None
        kept = _projected(args[0], self._between)
        self._gone = args[0] - kept
        return (kept, *args[1:])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output if self._gone is None else output - self._gone.view_as(output)


def _projected(hidden: Tensor, basis: Tensor) -> Tensor:
    return (hidden @ basis) @ basis.T


def _file(name: str) -> str:
    return f"basis-{name}.safetensors"
