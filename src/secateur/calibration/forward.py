"""The model's own forward with its blocks taken out: what it passes to them, what it makes of their output.

Masks, rotary tables, scalings and soft-capping differ from family to family and between layers of one model;
nothing of that is rebuilt here. The forward runs as it is, with something else in the place of every block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.calibration.windows import Windows
from secateur.core.errors import AnatomyError

__all__ = ["Call", "Captured", "Forward"]

HIDDEN = "hidden_states"
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Tensor)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one block beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Hidden states and the rest of what a block was called with."""
        if args:
            return args[0], cls(args[1:], kwargs, False)
        rest = dict(kwargs)
        return rest.pop(HIDDEN), cls((), rest, True)

    def __call__(self, module: nn.Module, hidden: Tensor) -> Any:
        if self.by_name:
            return module(**{HIDDEN: hidden}, **self.kwargs)
        return module(hidden, *self.args, **self.kwargs)


@dataclass(frozen=True, eq=False)
class Captured:
    """What one batch brings to the blocks.

    Attributes:
        hidden: (B, T, d), input of block 0.
        calls: one for each block.
    """

    hidden: Tensor
    calls: tuple[Call, ...]

    def same_calls(self, calls: tuple[Call, ...]) -> bool:
        return _equal(self.calls, calls, {})


class _EnoughError(Exception):
    """Ends a forward once everything wanted was seen."""


class _DisorderError(Exception):
    """The blocks were not called as a chain; says how."""


class Forward:
    """Runs the forward of `model` around its blocks, and single blocks as the model would.

    Args:
        model: in eval mode, everything outside the blocks loaded.
        blocks: in order.
        device: where the model computes.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.model, self.blocks, self.device = model, blocks, device
        self._extras: int | None = None  # outputs of a block beside hidden states; -1 for a bare tensor
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def capture(self, batch: Windows) -> Captured:
        """The input of block 0 and the calls of all blocks.

        Raises:
            AnatomyError: blocks that are not called one after the other on the output of the one before, or
                that are passed what earlier blocks made (shared keys and values, routing choices).
        """
        if self._extras is None:
            self._extras = self._probe(next(batch.batches(1)))
        return self._record(batch, self._extras)

    def run(self, call: Call, module: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after one block, (B, T, d)."""
        output = call(module, hidden)
        self._extras = len(output) - 1 if isinstance(output, tuple) else -1
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def logits(self, batch: Windows, hidden: Tensor) -> Tensor:
        """(B, T, vocabulary) from the output of the last block, by the model's own norm and head."""
        last, extras = len(self.blocks) - 1, -1 if self._extras is None else self._extras

        def instead(index: int, *args: Any, **kwargs: Any) -> Any:
            passed = Call.split(args, kwargs)[0]
            return _output(hidden if index == last else passed, (None,) * extras, extras)

        with _replaced(self.blocks, instead):
            return self.model(**self._inputs(batch)).logits  # type: ignore[no-any-return]

    def _probe(self, batch: Windows) -> int:
        """Whether blocks return a tensor or a tuple, after checking that their arguments are theirs alone."""
        reasons: list[str] = []
        for extras in (-1, 1):
            try:
                plain = self._record(batch, extras)
                changed = self._record(batch, extras, lambda hidden: hidden.flip(-1) + 1)
            except _DisorderError as disorder:
                reasons.insert(0, str(disorder))
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                reasons.append(f"fails around blocks that do nothing ({error})")
            else:
                if plain.same_calls(changed.calls):
                    return extras
                reasons.insert(0, "passes blocks what it computes from the output of earlier ones")
        raise AnatomyError(
            f"{type(self.model).__name__} {reasons[0]}",
            "blocks that are called one after the other on hidden states",
            "this model cannot be pruned block by block",
        )

    def _record(
        self, batch: Windows, extras: int, between: Callable[[Tensor], Tensor] = torch.clone
    ) -> Captured:
        recorder = _Recorder(len(self.blocks), extras, between)
        try:
            with _replaced(self.blocks, recorder):
                self.model(**self._inputs(batch))
        except _EnoughError:
            return Captured(recorder.inputs[0], tuple(recorder.calls))
        raise _DisorderError(f"calls only {len(recorder.calls)} of its {len(self.blocks)} blocks")

    def _inputs(self, batch: Windows) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.ids.to(self.device), "use_cache": False}
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask.to(self.device, torch.int64)
            if self._takes_positions:
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_(min=0)
        return inputs


class _Recorder:
    """In the place of the blocks: writes calls down and hands hidden states on, changed by `between`."""

    def __init__(self, count: int, extras: int, between: Callable[[Tensor], Tensor]) -> None:
        self.count, self.extras, self.between = count, extras, between
        self.calls: list[Call] = []
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None
        self.marks: list[Tensor] = []

    def __call__(self, index: int, *args: Any, **kwargs: Any) -> Any:
        hidden, call = Call.split(args, kwargs)
        if index != len(self.calls):
            raise _DisorderError(f"calls block {index} where block {len(self.calls)} is due")
        if index and hidden is not self.output:
            raise _DisorderError(f"changes hidden states between blocks {index - 1} and {index}")
        for name, value in [*enumerate(call.args, 1), *call.kwargs.items()]:
            if not self._replayable(value):
                raise _DisorderError(
                    f"passes block {index} a {type(value).__name__} that other blocks fill ({name})"
                )
        self.calls.append(call)
        self.inputs.append(hidden)
        if len(self.calls) == self.count:
            raise _EnoughError
        self.output = self.between(hidden)
        self.marks += [hidden.new_zeros(()) for _ in range(self.extras)]
        return _output(self.output, tuple(self.marks[-self.extras :]), self.extras)

    def _replayable(self, value: Any) -> bool:
        """Plain values and full containers of them. What is empty, or a cache, is there to be written to."""
        if isinstance(value, Mapping):
            return len(value) > 0 and all(map(self._replayable, value.values()))
        if isinstance(value, tuple | list):
            return (len(value) > 0 or isinstance(value, tuple)) and all(map(self._replayable, value))
        return isinstance(value, PLAIN) and not any(value is mark for mark in self.marks)


def _output(hidden: Tensor, others: tuple[Any, ...], extras: int) -> Any:
    return hidden if extras < 0 else (hidden, *others)


@contextmanager
def _replaced(blocks: Sequence[nn.Module], instead: Callable[..., Any]) -> Iterator[None]:
    """Calls of block `i` become `instead(i, ...)` inside; what was there before is put back."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            vars(block)["forward"] = partial(instead, index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                vars(block)["forward"] = forward


def _equal(a: Any, b: Any, known: dict[tuple[int, int], bool]) -> bool:
    """Whether two sets of arguments are equal in every value; what many blocks share is compared once."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        pair = id(a), id(b)
        if pair not in known:
            known[pair] = a.dtype == b.dtype and torch.equal(a, b)
        return known[pair]
    if isinstance(a, Call) and isinstance(b, Call):
        return _equal((a.args, a.kwargs), (b.args, b.kwargs), known)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key], known) for key in a)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_equal(x, y, known) for x, y in zip(a, b, strict=True))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
