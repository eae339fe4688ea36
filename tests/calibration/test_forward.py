"""The forward around the blocks, and its refusal of models whose blocks are no chain."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.calibration.forward import Forward
from secateur.calibration.windows import Windows
from secateur.core.errors import AnatomyError

WINDOWS = Windows.of(torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0)))
CPU = torch.device("cpu")

Loop = Callable[[nn.ModuleList, Tensor], Tensor]


class Toy(nn.Module):
    """A decoder whose way through its blocks is `loop`."""

    def __init__(self, loop: Loop, tuples: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.blocks = nn.ModuleList(ToyBlock(tuples) for _ in range(3))
        self.loop = loop

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.head(self.loop(self.blocks, self.embed(input_ids))))


class ToyBlock(nn.Module):
    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self.mix, self.tuples = nn.Linear(8, 8), tuples

    def forward(self, hidden: Tensor, *others: Any) -> Any:
        output = hidden + self.mix(hidden).tanh()
        return (output, output.sum()) if self.tuples else output


def chain(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for index, block in enumerate(blocks):
        hidden = block(hidden, index)
    return hidden


def first_of_tuple(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)[0]
    return hidden


def pair(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden, _ = block(hidden)
    return hidden


def shared_cache(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    states: dict[str, Tensor] = {}
    for block in blocks:
        hidden = block(hidden, states)
    return hidden


def passes_earlier_output(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    extra = None
    for block in blocks:
        hidden, extra = block(hidden, extra)
    return hidden


def depends_on_hidden(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden, hidden.mean())
    return hidden


def works_between(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden) * 2
    return hidden


def skips_one(blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    return blocks[2](blocks[0](hidden))


def forward_of(model: Any, blocks: Any = None) -> Forward:
    return Forward(model, list(model.blocks if blocks is None else blocks), CPU)


@pytest.mark.parametrize(
    ("loop", "tuples"),
    [(chain, False), (first_of_tuple, True), (pair, True)],
    ids=["tensor", "first", "pair"],
)
def test_blocks_may_return_tensors_or_tuples(loop: Loop, tuples: bool) -> None:
    model = Toy(loop, tuples)
    forward = forward_of(model)
    captured = forward.capture(WINDOWS)
    hidden = captured.hidden
    for call, block in zip(captured.calls, model.blocks, strict=True):
        hidden = forward.run(call, block, hidden)
    expected = model(WINDOWS.ids, False).logits
    assert torch.equal(forward.logits(WINDOWS, hidden), expected)
    assert torch.equal(model(WINDOWS.ids, False).logits, expected)


@pytest.mark.parametrize(
    ("loop", "tuples", "reason"),
    [
        (shared_cache, False, "passes block 0 a dict that other blocks fill"),
        (passes_earlier_output, True, "passes block 1 a Tensor that other blocks fill"),
        (depends_on_hidden, False, "computes from the output of earlier ones"),
        (works_between, False, "changes hidden states between blocks 0 and 1"),
        (skips_one, False, "calls block 2 where block 1 is due"),
    ],
)
def test_models_whose_blocks_are_no_chain_are_refused(loop: Loop, tuples: bool, reason: str) -> None:
    model = Toy(loop, tuples)
    with pytest.raises(AnatomyError, match=reason):
        forward_of(model).capture(WINDOWS)
    assert not any("forward" in vars(block) for block in model.blocks)


def test_shared_keys_and_values_are_refused() -> None:
    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=2, laurel_rank=4,
        hidden_size_per_layer_input=4, vocab_size_per_layer_input=VOCAB, activation_sparsity_pattern=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(AnatomyError, match="cannot be pruned block by block"):
        forward_of(model, model.model.layers).capture(WINDOWS)


def test_every_layer_type_gets_its_own_mask_and_rotary_table() -> None:
    model = tiny_model("gemma3_text")
    captured = forward_of(model, model.model.layers).capture(
        Windows.of(torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1)))
    )
    sliding, again, full = (call.kwargs for call in captured.calls)
    assert sliding["attention_mask"] is again["attention_mask"] is not full["attention_mask"]
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


def test_calls_are_compared_by_value() -> None:
    model = tiny_model("gpt_oss")
    forward = forward_of(model, model.model.layers)
    one, other = forward.capture(WINDOWS), forward.capture(WINDOWS)
    assert one.calls[0].kwargs["attention_mask"] is not other.calls[0].kwargs["attention_mask"]
    assert one.same_calls(other.calls)
    masked = Windows.of(WINDOWS.ids, torch.arange(12).expand(3, 12) > 2)
    assert not one.same_calls(forward.capture(masked).calls)
