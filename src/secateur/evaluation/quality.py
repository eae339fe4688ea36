"""Perplexity of a model, and how far its predictions are from those of another."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.activations import Activations, Batch
from secateur.calibration.driver import Driver
from secateur.calibration.routing import counting_visits
from secateur.calibration.source import BlockSource
from secateur.calibration.windows import Windows
from secateur.core.errors import CalibrationError, CheckpointError, InputError
from secateur.core.progress import SILENT, Progress, track

__all__ = [
    "Protocol",
    "Quality",
    "compare_quality",
    "logit_rows",
    "only_rows",
    "perplexity",
    "predicted_tokens",
    "predictions",
    "propagate",
    "protocol_of",
    "summed_loss",
]

HOST_LOGIT_BYTES, DEVICE_LOGIT_BYTES = 64 << 20, 256 << 20
"""Size of one float32 tensor of logits in host memory and on a GPU; about three exist at a time."""

LARGEST_EXPONENT = 709.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quality:
    """What a model predicts, on the tokens of some windows.

    Attributes:
        perplexity: exp of the mean next-token cross-entropy inside the windows.
        kl_divergence: mean KL(dense || this model) of the next-token distributions, nats a token.
        top1_agreement: fraction of tokens for which both models find the same token most likely.
        tokens: predicted tokens: all real ones that follow a real one in the same window.
        perplexity_error: standard error of `perplexity` over the windows; `None` for one window.
        kl_error: standard error of `kl_divergence` over the windows; `None` for one window.
        visits: by block with routed experts, the tokens that visited each.
    """

    perplexity: float
    kl_divergence: float
    top1_agreement: float
    tokens: int
    perplexity_error: float | None = None
    kl_error: float | None = None
    visits: Mapping[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """What a perplexity was measured on. Two numbers compare only when all of it but `dtype` is equal.

    Attributes:
        text: where the windows come from.
        text_sha256: of the token windows.
        split: which part of the text, in words.
        window, stride: tokens a window, and from one to the next; equal, since windows do not overlap.
        windows, tokens: how many of them, real tokens only.
        dtype: that the model computed in; losses are float32, their sums float64.
        tokenizer_sha256: of the tokenizer file, or of the vocabulary where there is no file.
    """

    text: str
    text_sha256: str
    split: str | None
    window: int
    stride: int
    windows: int
    tokens: int
    dtype: str
    tokenizer_sha256: str


def protocol_of(
    windows: Windows, dtype: torch.dtype, tokenizer: Any, *, split: str | None = None
) -> dict[str, Any]:
    """The fields of `Protocol`, JSON-able.

    Args:
        tokenizer: a tokenizer, or the model folder that holds its files.

    Raises:
        CheckpointError: a folder without a tokenizer.
    """
    protocol = Protocol(
        text=windows.source,
        text_sha256=windows.sha256,
        split=split,
        window=windows.length,
        stride=windows.length,
        windows=len(windows),
        tokens=windows.tokens,
        dtype=str(dtype).removeprefix("torch."),
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
    )
    return asdict(protocol)


def perplexity(
    source: BlockSource, windows: Windows, *, batch_size: int | None = None, progress: Progress = SILENT
) -> float:
    """exp of the mean next-token cross-entropy inside each window (one-shot-baselines, section 2.12).

    Blocks are read one by one and the vocabulary is never expanded for more than a few tokens, so models
    larger than memory can be judged. Padding does not count.

    Args:
        windows: that do not overlap.
        batch_size: windows that pass a block at once; by default what suits the device.

    Raises:
        CalibrationError: windows the model cannot take, or without a token to predict.

    >>> perplexity(FolderSource(Checkpoint.open("seedling")), windows)  # doctest: +SKIP
    """
    driver = propagate(source, windows, batch_size, progress)
    losses = [_normalise(logits, targets) for logits, targets in predictions(driver, logit_rows(source))]
    return _exp(float(torch.cat(losses).double().mean()))


def summed_loss(source: BlockSource, held: Activations, batch: Batch, hidden: Tensor) -> float:
    """Sum of the next-token cross-entropies, in nats, of the tokens of one batch.

    Args:
        source: of the model, everything outside its blocks loaded.
        held: knows the forward around the blocks.
        hidden: (B, T, d) output of the last block, whatever came before it.
    """
    logits = partial(held.logits, batch, hidden)
    chunks = _chunks(source, batch.windows, logits, logit_rows(source))
    return sum(float(_normalise(found, targets).double().sum()) for found, targets in chunks)


def predicted_tokens(windows: Windows) -> int:
    """Tokens that a perplexity on these windows is the mean over."""
    return int(windows.predicting.sum())


def compare_quality(
    dense: BlockSource,
    pruned: BlockSource,
    windows: Windows,
    *,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Quality, Quality]:
    """Perplexity of both models, and divergence and agreement of the second with the first.

    The final hidden states of both, (n, T, d), are kept while their logits are compared a few tokens at a
    time; beside them only what stands outside the blocks of both models is in memory.

    Returns:
        Quality of the dense model (which agrees with itself) and of the pruned one.

    Raises:
        InputError: models with different vocabularies.
        CalibrationError: as `perplexity`.
    """
    sizes = [source.config.get_text_config().vocab_size for source in (dense, pruned)]
    if sizes[0] != sizes[1]:
        raise InputError(f"vocabularies of {sizes[0]} and {sizes[1]} tokens", "two models with the same one")
    visits: tuple[dict[int, list[int]], ...] = ({}, {})
    drivers = [
        propagate(source, windows, batch_size, progress, counted)
        for source, counted in zip((dense, pruned), visits, strict=True)
    ]
    at_once = min(map(logit_rows, (dense, pruned)))
    pairs = zip(*(predictions(driver, at_once) for driver in drivers), strict=True)
    compared = [_compare(logits, other, targets) for (logits, targets), (other, _) in pairs]
    before, after, divergence, agreement = (torch.cat(column).cpu() for column in zip(*compared, strict=True))
    owners = _owners(windows)
    return (
        _quality(before, torch.zeros_like(divergence), torch.ones_like(agreement), owners, visits[0]),
        _quality(after, divergence, agreement, owners, visits[1]),
    )


def propagate(
    source: BlockSource,
    windows: Windows,
    batch_size: int | None,
    progress: Progress,
    visits: dict[int, list[int]] | None = None,
) -> Driver:
    """A driver that holds the final hidden states; `visits` is filled as in `Quality`."""
    if not predicted_tokens(windows):
        raise CalibrationError(
            f"windows of {windows.source} without two real tokens in a row", "a token to predict"
        )
    driver = Driver(source, windows, batch_size=batch_size, progress=progress)
    blocks = track(progress, "evaluating", driver.blocks(), len(source.anatomy.blocks))
    for block in blocks:
        if visits is None:
            block.finish()
            continue
        with counting_visits(block.block, block.module) as counting:
            block.finish(counting[0] if counting else None)
        if counting:
            visits[block.index] = counting[1].tolist()
    return driver


def _owners(windows: Windows) -> Tensor:
    """The window of each predicted token, in the order of `predictions`."""
    return windows.predicting.nonzero()[:, 0]


def predictions(driver: Driver, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (r, vocabulary) in float32 and next tokens (r,) of all predicting positions, r <= `at_once`."""
    for index, batch in enumerate(driver.batches):
        yield from _chunks(driver.source, batch, partial(driver.logits, index), at_once)


def _chunks(
    source: BlockSource, windows: Windows, logits: Callable[[], Tensor], at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    head, device = source.model.get_submodule(source.anatomy.head), source.device
    positions = windows.predicting.flatten().nonzero()[:, 0]
    targets = windows.ids.flatten()[positions + 1].to(device)
    chunks = zip(torch.split(positions.to(device), at_once), torch.split(targets, at_once), strict=True)
    for rows, following in chunks:
        with only_rows(head, rows):
            found = logits()[0].float()
        yield found, following


def logit_rows(source: BlockSource) -> int:
    """Tokens whose logits fit into memory at once."""
    limit = HOST_LOGIT_BYTES if source.device.type == "cpu" else DEVICE_LOGIT_BYTES
    vocabulary: int = source.config.get_text_config().vocab_size
    return max(1, limit // (4 * vocabulary))


@contextmanager
def only_rows(head: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let `head` see these of the B * T tokens only, as one sequence.

    The model then applies whatever follows its head (scaling, soft-capping) to a few rows, and no tensor of
    the size of the vocabulary times the batch is made.
    """

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[rows].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def _compare(dense: Tensor, pruned: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (r, vocabulary) logits, each (r,): both cross-entropies, KL(dense || pruned), equal first choice.

    Works in place: both arguments are used up.
    """
    pruned = pruned.to(dense.device)
    agreement = dense.argmax(-1) == pruned.argmax(-1)
    before, after = (_normalise(logits, targets) for logits in (dense, pruned))
    difference = pruned.neg_().add_(dense)
    divergence = dense.exp_().mul_(difference).sum(-1)
    return before, after, divergence, agreement


def _normalise(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn (r, vocabulary) logits into log-probabilities, in place; the cross-entropies (r,)."""
    logits.sub_(logits.logsumexp(-1, keepdim=True))
    return -logits.gather(-1, targets[:, None])[:, 0]


def _quality(
    losses: Tensor, divergence: Tensor, agreement: Tensor, owners: Tensor, visits: Mapping[int, list[int]]
) -> Quality:
    loss, loss_error = _mean_and_error(losses, owners)
    kl, kl_error = _mean_and_error(divergence, owners)
    found = _exp(loss)
    if not math.isfinite(found):
        logger.warning("the perplexity is %s: the model predicts with overflowing or undefined logits", found)
    return Quality(
        perplexity=found,
        kl_divergence=max(kl, 0.0),
        top1_agreement=float(agreement.double().mean()),
        tokens=len(losses),
        perplexity_error=None if loss_error is None else found * loss_error,
        kl_error=kl_error,
        visits=visits,
    )


def _mean_and_error(values: Tensor, owners: Tensor) -> tuple[float, float | None]:
    """Mean over tokens, and its standard error with windows as the independent samples.

    Windows may hold different numbers of tokens: this is the error of a ratio of sums, which for equal
    numbers is the usual standard error of the window means.
    """
    values = values.double()
    mean = values.mean()
    tokens = torch.bincount(owners)
    excess = torch.bincount(owners, weights=values - mean)
    windows = int((tokens > 0).sum())
    if windows < 2:
        return float(mean), None
    error = (excess.square().sum() * windows / (windows - 1)).sqrt() / len(values)
    return float(mean), float(error)


def _exp(loss: float) -> float:
    return math.inf if loss > LARGEST_EXPONENT else math.exp(loss)


def _tokenizer_sha256(tokenizer: Any) -> str:
    folder = tokenizer if isinstance(tokenizer, str | Path) else getattr(tokenizer, "name_or_path", "")
    files = [Path(folder) / name for name in TOKENIZER_FILES] if folder else []
    for file in files:
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()
    if isinstance(tokenizer, str | Path):
        raise CheckpointError(f"no tokenizer in {folder}", f"one of {', '.join(TOKENIZER_FILES)}")
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()
