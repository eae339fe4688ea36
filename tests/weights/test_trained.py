"""On a real trained model, with real activations: the layer losses stand in the order they should."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from secateur.core.errors import RecipeError
from secateur.core.method import METHODS
from secateur.core.pattern import Pattern
from secateur.core.statistics import InputStatistics
from secateur.weights.allocation import ALLOCATIONS
from secateur.weights.allocation.base import weighted_mean
from secateur.weights.base import Problem
from secateur.weights.losses import reconstruction_loss

from .problems import observe

WINDOWS, LENGTH = 16, 128
Layers = dict[str, tuple[Tensor, InputStatistics]]


@pytest.fixture(scope="module")
def model(shared: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(shared / "models/stories260k", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def layers(shared: Path, model: PreTrainedModel) -> Layers:
    """Weight and statistics of every linear of the blocks, from one plain forward with hooks."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    text = (shared / "data/tinystories/calibration.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[: WINDOWS * LENGTH])
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].flatten(0, 1)

        return hook

    handles = [module.register_forward_pre_hook(remember(name)) for name, module in linears.items()]
    with torch.no_grad():
        model(ids.view(WINDOWS, LENGTH))
    for handle in handles:
        handle.remove()
    found = {
        name: (module.weight.detach().clone(), observe(seen[name], WINDOWS))
        for name, module in linears.items()
    }
    gc.collect()
    return found


def mean_loss(layers: Layers, method: str, pattern: str, p: float) -> float:
    losses = []
    for name, (weight, inputs) in layers.items():
        entry = METHODS.get(method)()
        parsed = Pattern.parse(pattern).resolve(entry.default_pattern)
        generator = torch.Generator().manual_seed(0)
        solution = entry.prune(Problem(name, weight, inputs, parsed, p, torch.zeros_like(weight), generator))
        losses.append(reconstruction_loss(weight, solution.weight, inputs))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)]
)
def test_order_of_the_methods(layers: Layers, pattern: str, sparsity: float) -> None:
    names = ["alps", "sparsegpt", "wanda", "magnitude", "random"]
    losses = [mean_loss(layers, name, pattern, sparsity) for name in names]
    assert losses == sorted(losses), dict(zip(names, losses, strict=True))
    assert losses[0] < 0.85 * losses[1], "ALPS improves clearly on SparseGPT"
    assert losses[1] < 0.85 * losses[2], "the update of SparseGPT pays"


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_refinement_improves_its_base(layers: Layers, sparsity: float) -> None:
    assert mean_loss(layers, "dsnot", "row", sparsity) < mean_loss(layers, "wanda", "row", sparsity)


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "alps", "dsnot"])
def test_looser_patterns_lose_less(layers: Layers, method: str) -> None:
    losses = [mean_loss(layers, method, pattern, 0.5) for pattern in ("row", "2:4", "1:2")]
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", ["owl", "alpha"])
def test_allocations_differ_between_blocks_and_keep_the_mean(layers: Layers, name: str) -> None:
    blocks: dict[int, list[tuple[str, Tensor, InputStatistics]]] = {}
    for layer, (weight, inputs) in layers.items():
        blocks.setdefault(int(layer.split(".")[2]), []).append((layer, weight, inputs))
    allocation = ALLOCATIONS.get(name)()
    measured = [allocation.measure(index, matrices) for index, matrices in sorted(blocks.items())]
    sizes = [sum(weight.numel() for _, weight, _ in matrices) for _, matrices in sorted(blocks.items())]
    result = allocation.sparsities(measured, sizes, 0.6)
    assert weighted_mean(result, sizes) == pytest.approx(0.6, abs=1e-9)
    assert max(result) - min(result) > 0.1


def test_a_width_that_does_not_divide_is_refused(layers: Layers) -> None:
    """FFN 172 is no multiple of 8."""
    with pytest.raises(RecipeError, match="172"):
        mean_loss(layers, "wanda", "3:8", 0.5)
