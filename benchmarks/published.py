"""The published one-shot procedures, written plainly: what secateur is timed against.

Each function follows its paper's own order of work, without any of the savings that secateur makes:
a hook on every linear layer (so q, k and v each sum the same statistics again), one calibration
sequence at a time, two activation buffers, complete sorts for masks, and SparseGPT one column at a time
with the Cholesky factor, the inverse and the factor of the inverse one after the other.

The model is a Llama of transformers held in memory; it is pruned in place. Sources: Wanda
(arXiv 2306.11695), SparseGPT (arXiv 2301.00774), magnitude as both papers compare with it.

    python benchmarks/published.py MODEL CALIBRATION.txt TEST.txt --method sparsegpt --sparsity 0.5 --exact
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

__all__ = [
    "Pruned",
    "perplexity",
    "published_magnitude",
    "published_sparsegpt",
    "published_wanda",
    "read_windows",
    "sparsegpt_update",
]

COLUMN_BLOCK = 128
DAMPING = 0.01


@dataclass(frozen=True)
class Pruned:
    """One matrix after pruning.

    Attributes:
        name: path inside the model.
        sparsity: fraction of zeros reached.
        seconds: time spent on choosing the mask and updating the weights.
        loss: SparseGPT's sum of squared errors / 2, `None` where the method computes none.
    """

    name: str
    sparsity: float
    seconds: float
    loss: float | None = None


class _ForwardEndedError(Exception):
    """Ends the forward pass once the input of block 0 is known."""


class _InputNorms:
    """Wanda's running mean over sequences of the sum over tokens of x_j^2, for one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.mean = torch.zeros(layer.in_features, device=layer.weight.device)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        self.mean *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.mean += inputs.float().norm(p=2, dim=0) ** 2 / self.sequences


class _Hessian:
    """SparseGPT's running (2 / sequences) X X^T in float32, for one linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        width = layer.in_features
        self.mean = torch.zeros(width, width, device=layer.weight.device)
        self.sequences = 0

    def add(self, inputs: Tensor) -> None:
        self.mean *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        columns = math.sqrt(2 / self.sequences) * inputs.t().float()
        self.mean += columns @ columns.t()


Statistic = type[_InputNorms] | type[_Hessian]
Update = Callable[[nn.Linear, Tensor], float | None]


def published_magnitude(
    model: LlamaForCausalLM, sparsity: float, *, keep_of: tuple[int, int] | None = None, exact: bool = False
) -> list[Pruned]:
    """Drop the smallest |W| of every matrix. `exact`: exact counts instead of a threshold."""

    def prune(layer: nn.Linear) -> None:
        weight = layer.weight.data
        dropped = _smallest(weight.abs().float(), sparsity, keep_of, exact)
        weight[dropped] = 0

    return [
        _timed(f"{index}.{name}", layer, partial(prune, layer))
        for index, block in enumerate(model.model.layers)
        for name, layer in _linears(block).items()
    ]


@torch.no_grad()
def published_wanda(
    model: LlamaForCausalLM, ids: Tensor, sparsity: float, *, keep_of: tuple[int, int] | None = None
) -> list[Pruned]:
    """Drop, in every output row, the smallest |W_ij| * norm(X_j) (its counts are exact by themselves).

    Args:
        ids: (n, T) token ids of the calibration windows.
        keep_of: (N, M) to keep N of every M consecutive inputs; `sparsity` then says nothing.
    """

    def update(layer: nn.Linear, mean: Tensor) -> None:
        weight = layer.weight.data
        scores = weight.abs() * mean.sqrt().reshape(1, -1)
        if keep_of:
            dropped = _smallest_of_groups(scores.float(), *keep_of)
        else:
            order = torch.sort(scores, dim=-1, stable=True)[1]
            dropped = torch.zeros_like(scores, dtype=torch.bool)
            dropped.scatter_(1, order[:, : int(scores.shape[1] * sparsity)], True)
        weight[dropped] = 0

    return _prune_blocks(model, ids, _InputNorms, update)


@torch.no_grad()
def published_sparsegpt(
    model: LlamaForCausalLM,
    ids: Tensor,
    sparsity: float,
    *,
    keep_of: tuple[int, int] | None = None,
    exact: bool = False,
) -> list[Pruned]:
    """Choose masks in blocks of 128 columns and compensate column by column.

    Args:
        ids: (n, T) token ids of the calibration windows.
        keep_of: (N, M) to keep N of every M consecutive inputs; `sparsity` then says nothing.
        exact: exact counts in each block of columns instead of the published threshold, which drops at
            least one weight more than asked and every tie.
    """

    def update(layer: nn.Linear, hessian: Tensor) -> float:
        pruned, loss = sparsegpt_update(
            layer.weight.data.float(), hessian, sparsity, keep_of=keep_of, exact=exact
        )
        layer.weight.data = pruned.to(layer.weight.dtype)
        return loss

    return _prune_blocks(model, ids, _Hessian, update)


def sparsegpt_update(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    *,
    keep_of: tuple[int, int] | None = None,
    exact: bool = False,
) -> tuple[Tensor, float]:
    """One matrix by SparseGPT, column by column: the pruned weight and its loss.

    Args:
        weight: (out, in) float32.
        hessian: (in, in) float32; not changed.
    """
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    factor = _inverse_factor(hessian)
    loss = torch.zeros((), device=weight.device)
    for start in range(0, weight.shape[1], COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, weight.shape[1])
        block, triangle = weight[:, start:stop].clone(), factor[start:stop, start:stop]
        dropped = torch.zeros_like(block, dtype=torch.bool)
        if not keep_of:
            dropped = _smallest(block**2 / triangle.diagonal() ** 2, sparsity, None, exact)
        errors, block_loss = _prune_columns(block, triangle, dropped, keep_of)
        weight[:, start:stop] = block
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
        loss += block_loss
    return weight, float(loss)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U = inverse of the damped Hessian."""
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _prune_columns(
    block: Tensor, triangle: Tensor, dropped: Tensor, keep_of: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Prune the columns of `block` in place, one after the other; the scaled errors and the loss."""
    errors, loss = torch.zeros_like(block), torch.zeros((), device=block.device)
    for column in range(block.shape[1]):
        pivot = triangle[column, column]
        if keep_of and column % keep_of[1] == 0:
            group = slice(column, column + keep_of[1])
            scores = block[:, group] ** 2 / triangle.diagonal()[group] ** 2
            dropped[:, group] = _smallest_of_groups(scores, *keep_of)
        before = block[:, column].clone()
        after = before.clone()
        after[dropped[:, column]] = 0
        error = (before - after) / pivot
        block[:, column:] -= error.unsqueeze(1) @ triangle[column, column:].unsqueeze(0)
        block[:, column] = after
        errors[:, column] = error
        loss += (error**2).sum() / 2
    return errors, loss


def _smallest(scores: Tensor, sparsity: float, keep_of: tuple[int, int] | None, exact: bool) -> Tensor:
    """The smallest of a whole matrix, by exact count or by the published threshold."""
    if keep_of:
        return _smallest_of_groups(scores, *keep_of)
    values, order = torch.sort(scores.flatten(), stable=True)
    count = int(scores.numel() * sparsity)
    if not exact:
        return scores <= values[count]
    dropped = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    dropped[order[:count]] = True
    return dropped.view_as(scores)


def _smallest_of_groups(scores: Tensor, keep: int, of: int) -> Tensor:
    dropped = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], of):
        group = scores[:, start : start + of]
        smallest = torch.topk(group, of - keep, dim=1, largest=False)[1]
        dropped.scatter_(1, start + smallest, True)
    return dropped


def _prune_blocks(model: LlamaForCausalLM, ids: Tensor, statistic: Statistic, update: Update) -> list[Pruned]:
    """Statistics of a block from the pruned blocks before it, then its masks, then its new outputs."""
    inputs, kwargs = _capture(model, ids)
    outputs = torch.zeros_like(inputs)
    rows: list[Pruned] = []
    for index, block in enumerate(model.model.layers):
        layers = _linears(block)
        observers = {name: statistic(layer) for name, layer in layers.items()}
        hooks = [layer.register_forward_hook(_observe(observers[name])) for name, layer in layers.items()]
        _run_block(block, inputs, outputs, kwargs)
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            rows.append(_timed(f"{index}.{name}", layer, partial(update, layer, observers[name].mean)))
        _run_block(block, inputs, outputs, kwargs)
        inputs, outputs = outputs, inputs
    return rows


def _capture(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """(n, T, d) inputs of block 0 and what else the model passes to a block."""
    hidden: list[Tensor] = []
    passed: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        passed.update(kwargs)
        raise _ForwardEndedError

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids.to(model.device):
        with suppress(_ForwardEndedError):
            model(row.unsqueeze(0), use_cache=False)
    hook.remove()
    return torch.cat(hidden), passed


def _run_block(block: nn.Module, inputs: Tensor, outputs: Tensor, kwargs: dict[str, Any]) -> None:
    for row in range(len(inputs)):
        outputs[row] = block(inputs[row].unsqueeze(0), **kwargs)[0]


def _observe(observer: _InputNorms | _Hessian) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        observer.add(args[0].reshape(-1, args[0].shape[-1]))

    return hook


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}


def _timed(name: str, layer: nn.Linear, work: Callable[[], float | None]) -> Pruned:
    _wait_for(layer.weight.device)
    started = time.perf_counter()
    loss = work()
    _wait_for(layer.weight.device)
    seconds = time.perf_counter() - started
    return Pruned(name, float((layer.weight == 0).float().mean()), seconds, loss)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_windows(text: Path, tokenizer: Any, windows: int, length: int) -> Tensor:
    """(windows, length) ids: the whole file tokenised once, cut into consecutive windows."""
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: windows * length]).view(-1, length)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: Tensor) -> float:
    """exp of the mean next-token cross-entropy inside each window, one window at a time."""
    losses = [float(model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss) for row in ids.to(model.device)]
    return math.exp(sum(losses) / len(losses))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a Llama checkpoint")
    parser.add_argument("calibration", type=Path, help="text file")
    parser.add_argument("test", type=Path, help="text file")
    parser.add_argument("--method", choices=["magnitude", "wanda", "sparsegpt"], required=True)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--keep-of", type=int, nargs=2, metavar=("N", "M"), help="for example 2 4")
    parser.add_argument("--exact", action="store_true", help="exact counts instead of thresholds")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    return parser.parse_args()


def prune(model: LlamaForCausalLM, ids: Tensor, arguments: argparse.Namespace) -> None:
    keep_of = tuple(arguments.keep_of) if arguments.keep_of else None
    if arguments.method == "magnitude":
        published_magnitude(model, arguments.sparsity, keep_of=keep_of, exact=arguments.exact)
    elif arguments.method == "wanda":
        published_wanda(model, ids, arguments.sparsity, keep_of=keep_of)
    else:
        published_sparsegpt(model, ids, arguments.sparsity, keep_of=keep_of, exact=arguments.exact)


def main() -> None:
    arguments = parse_arguments()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    calibration, test = (
        read_windows(text, tokenizer, arguments.windows, arguments.length)
        for text in (arguments.calibration, arguments.test)
    )
    before, started = perplexity(model, test), time.perf_counter()
    prune(model, calibration, arguments)
    seconds = time.perf_counter() - started
    after = perplexity(model, test)
    print(json.dumps({"perplexity_before": before, "perplexity_after": after, "seconds": seconds}))


if __name__ == "__main__":
    main()
