"""How well assignments of levels predict: many candidates share one walk through the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from secateur.calibration.activations import computing
from secateur.calibration.driver import BATCH_TOKENS
from secateur.calibration.forward import Captured, Forward
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.core.evolution import Levels
from secateur.core.progress import SILENT
from secateur.evaluation.quality import logit_rows, only_rows, predicted_tokens, predictions, propagate
from secateur.pipeline.search.supernet import Supernet, Versions

__all__ = ["Judge", "Judging", "Reference"]

Judging: TypeAlias = Callable[[Sequence[Levels], str, Sequence[int]], list[float]]
"""The fitness of candidates on some windows of a reference; see `Judge`."""

STATE_BYTES = 1 << 30
"""Hidden states that candidates may hold at a time where blocks are read from files."""

REFERENCE_BYTES = 1 << 30
"""Predictions of the dense model that are kept; fewer likely tokens where they would be more."""


class Batch(NamedTuple):
    """Windows, and what their first block gets."""

    windows: Windows
    rows: Tensor
    captured: Captured


@dataclass(frozen=True)
class Reference:
    """What the dense model predicts on some windows.

    Attributes:
        windows: of n rows.
        place: (n, T) int64, number of each position among those that predict.
        likely: (N, k) float32, log-probabilities among the k likeliest tokens, or None: judge by perplexity.
        tokens: (N, k) int32, which they are.
    """

    windows: Windows
    place: Tensor
    likely: Tensor | None = None
    tokens: Tensor | None = None

    @classmethod
    def of_text(cls, windows: Windows) -> Reference:
        """For perplexity: the text itself."""
        counted = windows.predicting.flatten().cumsum(0) - 1
        return cls(windows, counted.view(windows.ids.shape))

    @classmethod
    def of_model(cls, source: BlockSource, windows: Windows, k: int) -> Reference:
        """For the divergence from this model; exact where k is the size of the vocabulary."""
        text = cls.of_text(windows)
        vocabulary: int = source.config.get_text_config().vocab_size
        k = max(1, min(k, vocabulary, REFERENCE_BYTES // (8 * windows.tokens)))
        driver = propagate(source, windows, None, SILENT)
        tops = [logits.topk(k) for logits, _ in predictions(driver, logit_rows(source))]
        likely = torch.cat([top.values.log_softmax(-1).cpu() for top in tops])
        return cls(windows, text.place, likely, torch.cat([top.indices.int().cpu() for top in tops]))

    def losses(self, logits: Tensor, targets: Tensor, places: Tensor) -> Tensor:
        """(r,) of (r, V) logits: KL(dense || these) over the likeliest tokens, or cross-entropy.

        Args:
            targets: (r,) next tokens.
            places: (r,) numbers of the positions.
        """
        if self.likely is None or self.tokens is None:
            return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        dense = self.likely[places].to(logits.device)
        own = logits.gather(-1, self.tokens[places].to(logits.device, torch.int64)).log_softmax(-1)
        return (dense.exp() * (dense - own)).sum(-1)


class Judge:
    """Fitness of candidates: the mean loss over tokens of the dense model with their versions installed.

    Candidates that agree in the first blocks share what comes out of them, so a swap in the last block costs
    one block. A result does not depend on which other candidates are judged with it.

    Args:
        source: the dense model.
        supernet: its blocks at all levels.
        references: by name, what is judged on.
        resident: keep all blocks and versions in memory; else they are read from their files in each walk,
            which all candidates that `STATE_BYTES` allow for take together.
    """

    def __init__(
        self, source: BlockSource, supernet: Supernet, references: dict[str, Reference], *, resident: bool
    ) -> None:
        self.source, self.supernet, self.references, self.resident = source, supernet, references, resident
        blocks = source.model.get_submodule(source.anatomy.blocks_path)
        self._forward = Forward(source.model, list(blocks.children()), source.device)
        self._head = source.model.get_submodule(source.anatomy.head)
        self._open: dict[int, tuple[nn.Module, Versions]] = {}
        self._ends = [0]
        for block in source.anatomy.blocks:
            self._ends.append(self._ends[-1] + len(supernet.of_block(block.index)))

    def __call__(self, candidates: Sequence[Levels], name: str, rows: Sequence[int]) -> list[float]:
        """The fitness of each, the lower the better.

        Args:
            candidates: one level for each ladder of the supernet.
            name: of the reference.
            rows: windows of it to judge on.
        """
        reference = self.references[name]
        sums = dict.fromkeys(candidates, 0.0)
        size = max(1, BATCH_TOKENS[self.source.device.type] // reference.windows.length)
        parts = [torch.tensor(rows[start : start + size]) for start in range(0, len(rows), size)]
        with computing(self.source.device):
            for walk in [[part] for part in parts] if self.resident else [parts]:
                batches = [self._batch(reference, part) for part in walk]
                for some in self._at_once(list(sums), batches):
                    self._walk(some, reference, batches, sums)
        counted = predicted_tokens(reference.windows.chosen(list(rows)))
        return [sums[levels] / max(counted, 1) for levels in candidates]

    def _batch(self, reference: Reference, rows: Tensor) -> Batch:
        windows = reference.windows.chosen(rows.tolist())
        return Batch(windows, rows, self._forward.capture(windows))

    def _at_once(self, candidates: list[Levels], batches: Sequence[Batch]) -> Iterator[list[Levels]]:
        """Parts of the candidates whose hidden states fit, neighbours in the tree together."""
        size = sum(batch.captured.hidden.nbytes for batch in batches)
        count = max(1, STATE_BYTES // (2 * size))
        ordered = sorted(candidates)
        return (ordered[start : start + count] for start in range(0, len(ordered), count))

    def _walk(
        self,
        candidates: Sequence[Levels],
        reference: Reference,
        batches: Sequence[Batch],
        sums: dict[Levels, float],
    ) -> None:
        """Add the losses of these candidates on these batches."""
        states: dict[Levels, list[Tensor]] = {(): [batch.captured.hidden for batch in batches]}
        for block in self.source.anatomy.blocks:
            states = self._through(block.index, states, candidates, batches)
        for levels, hidden in states.items():
            for batch, last in zip(batches, hidden, strict=True):
                sums[levels] += self._loss(reference, batch, last)

    def _through(
        self,
        index: int,
        states: dict[Levels, list[Tensor]],
        candidates: Sequence[Levels],
        batches: Sequence[Batch],
    ) -> dict[Levels, list[Tensor]]:
        """From the hidden states of each beginning of the candidates before a block to those behind it."""
        start, stop = self._ends[index], self._ends[index + 1]
        beginnings = sorted({levels[:stop] for levels in candidates}, key=lambda begun: begun[start:])
        after: dict[Levels, list[Tensor]] = {}
        installed: Levels | None = None
        with self._opened(index) as (module, versions):
            for begun in beginnings:
                if begun[start:] != installed:
                    installed = begun[start:]
                    self._install(index, module, versions, installed)
                after[begun] = [
                    self._forward.run(batch.captured.calls[index], module, hidden)
                    for batch, hidden in zip(batches, states[begun[:start]], strict=True)
                ]
        return after

    def _install(self, index: int, module: nn.Module, versions: Versions, levels: Levels) -> None:
        parameters = dict(module.state_dict())
        for ladder, level in zip(self.supernet.of_block(index), levels, strict=True):
            version = versions[ladder.units.kind][level]
            view = ladder.units.writer.view(parameters)
            columns = ladder.units.columns(version.kept).to(view.device)
            view.zero_().index_copy_(1, columns, version.weight.to(view.device))

    @contextmanager
    def _opened(self, index: int) -> Iterator[tuple[nn.Module, Versions]]:
        if index in self._open:
            yield self._open[index]
            return
        opened = self.source.open(index), self.supernet.read(index)
        if self.resident:
            self._open[index] = opened
        try:
            yield opened
        finally:
            if not self.resident:
                self.source.store(index, opened[0])

    def _loss(self, reference: Reference, batch: Batch, hidden: Tensor) -> float:
        """Sum over the positions that predict."""
        flat = batch.windows.predicting.flatten().nonzero()[:, 0]
        targets = batch.windows.ids.flatten()[flat + 1]
        places = reference.place[batch.rows].flatten()[flat]
        total = 0.0
        parts = (torch.split(each, logit_rows(self.source)) for each in (flat, targets, places))
        for positions, following, numbers in zip(*parts, strict=True):
            with only_rows(self._head, positions.to(self.source.device)):
                logits = self._forward.logits(batch.windows, hidden)[0].float()
            losses = reference.losses(logits, following.to(logits.device), numbers)
            total += float(losses.double().sum())
        return total
