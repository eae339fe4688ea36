"""A switch on a loaded model: tokens whose router is sure do without their lesser experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.anatomy.mixture import Mixture, mixture_of
from secateur.anatomy.resolve import resolve
from secateur.core.attention import attention_received
from secateur.core.errors import InputError
from secateur.experts.online import MedianRatio, OnlinePlan, Renormalise, Strategy, protected, reroute

__all__ = ["OnlinePruner", "prune_online"]

PREFIX = "secateur-"
Watch = Callable[[Tensor, Tensor, Tensor | None, float, Tensor | None], None]
_WATCHED: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()
"""What sees the queries and keys of an attention module."""
_SWITCHED: WeakSet[PreTrainedModel] = WeakSet()


def prune_online(
    model: PreTrainedModel,
    plan: str | Path | OnlinePlan,
    *,
    protect: float = 0.02,
    blocks: Collection[int] | None = None,
    most_blocks: int | None = None,
    strength: float = 1.0,
) -> OnlinePruner:
    """Let tokens do without experts that weigh little beside their first (mc-moe, section 2.5).

    Args:
        model: a loaded mixture of experts, dense or packed.
        plan: `odp.json` of a run of mc-moe on this model, or the folder of its result.
        protect: share of the tokens of each sequence, the most important ones, that keep all experts. While
            single tokens are generated nothing is known of their importance, and none is protected.
        blocks: where; by default in every block of the plan but the first two of the model.
        most_blocks: of these, the ones that lose least.
        strength: factor on the medians of the plan; 0 drops nothing.

    Returns:
        The switch, already on; `with` switches it off at the end.

    Raises:
        InputError: a model without experts, of other blocks than the plan, or one that is switched already.

    >>> with secateur.prune_online(model, "packed-model") as pruner:  # doctest: +SKIP
    ...     model.generate(**inputs)
    ...     pruner.saved
    """
    plan = plan if isinstance(plan, OnlinePlan) else OnlinePlan.load(plan)
    chosen = plan.usual(most_blocks) if blocks is None else sorted(set(blocks))
    medians = {block.block: block.medians[0] for block in plan.blocks}
    if missing := [block for block in chosen if block not in medians]:
        raise InputError(f"block {missing[0]}, of which the plan says nothing", f"some of {sorted(medians)}")
    if not chosen:
        raise InputError(
            f"a plan of blocks {sorted(medians)}, the first two of which are never pruned unasked",
            "other blocks with experts",
            "give blocks=[...]",
        )
    if strength < 0:
        raise InputError(f"strength {strength:g}", "a factor of 0 or more")
    strategy = MedianRatio({block: strength * medians[block] for block in chosen})
    return OnlinePruner(strategy, chosen, protect=protect).attach(model)


class OnlinePruner:
    """Drops experts of tokens while a model runs.

    Attributes:
        counts: by block, expert activations of real tokens that the router asked for, and those of them that
            were dropped; int64 tensors on the device of the model.

    Args:
        strategy: which of its experts a token does without.
        blocks: in which blocks.
        protect: share of the tokens of each sequence that keep all experts.
    """

    def __init__(self, strategy: Strategy, blocks: Collection[int], *, protect: float = 0.02) -> None:
        if not 0 <= protect <= 1:
            raise InputError(f"protect {protect:g}", "a share of the tokens, 0 to 1")
        self.strategy, self.blocks, self.protect = strategy, sorted(set(blocks)), protect
        self.counts: dict[int, Tensor] = {}
        self._received: dict[int, Tensor] = {}
        self._mask: Tensor | None = None
        self._undo, self._on = ExitStack(), False

    @property
    def saved(self) -> float:
        """Fraction of the expert activations of the pruned blocks that were dropped, over all calls."""
        asked, dropped = sum((count.cpu() for count in self.counts.values()), torch.zeros(2)).tolist()
        return dropped / asked if asked else 0.0

    def attach(self, model: PreTrainedModel) -> OnlinePruner:
        """Switch on. Raises `InputError` as `prune_online`."""
        mixtures = _mixtures(model)
        if missing := [block for block in self.blocks if block not in mixtures]:
            raise InputError(
                f"block {missing[0]}, which has no routed experts here", f"some of {sorted(mixtures)}"
            )
        if model in _SWITCHED or self._on:
            raise InputError("a model or switch that is in use", "one switch at a time", "detach it first")
        self._on = True
        _SWITCHED.add(model)
        self._undo.callback(_SWITCHED.discard, model)
        rule = Renormalise.of(model.config)
        for block in self.blocks:
            self._hook_experts(block, *mixtures[block], rule)
        hook = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._undo.callback(hook.remove)
        if self.protect and self.blocks:
            self._watch_attention(model, {mixtures[block][0]: block for block in self.blocks})
        return self

    def detach(self) -> None:
        """Switch off: the model is as it was."""
        self._undo.close()
        self._received.clear()
        self._mask, self._on = None, False

    def __enter__(self) -> OnlinePruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the (B, K) mask of padding of this call."""
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self._received.clear()

    def _hook_experts(self, block: int, owner: nn.Module, mixture: Mixture, rule: Renormalise) -> None:
        experts: Any = owner.get_submodule(mixture.module)
        self.counts[block] = torch.zeros(2, dtype=torch.int64, device=next(owner.parameters()).device)

        # what points behind the last expert is skipped by most implementations of experts, once this is set
        before = getattr(experts, "_is_expert_parallel", None)
        if before is not None:
            experts._is_expert_parallel = True
            self._undo.callback(setattr, experts, "_is_expert_parallel", before)
        skips = _skips(experts, mixture)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            routes = next(tensor for tensor in tensors[1:] if not tensor.is_floating_point())
            gates = next(tensor for tensor in tensors[1:] if tensor.is_floating_point())
            drop = self._dropped(block, tensors[0], gates)
            to, weights = reroute(routes, gates, drop, mixture.count, rule)
            swap = {id(routes): to if skips else routes, id(gates): weights}
            swapped = {name: swap.get(id(value), value) for name, value in kwargs.items()}
            return tuple(swap.get(id(value), value) for value in args), swapped

        handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
        self._undo.callback(handle.remove)

    def _dropped(self, block: int, rows: Tensor, gates: Tensor) -> Tensor:
        """(tokens, k) bool of (tokens, d) rows and their gates; the counts are brought up to date."""
        drop = self.strategy.drop(block, gates)
        real = self._real(len(rows))
        received = self._received.pop(block, None)
        if received is not None:
            batch, length = received.shape
            importance = rows.float().abs().sum(-1).view(batch, length) * received
            drop &= ~protected(importance, real.view(batch, length), self.protect).view(-1, 1)
        drop &= real[:, None]
        asked = real.sum() * gates.shape[1]
        self.counts[block] += torch.stack([asked, drop.sum()])
        return drop

    def _real(self, tokens: int) -> Tensor:
        """(tokens,) bool: no padding."""
        if self._mask is None:
            return torch.ones(tokens, dtype=torch.bool, device=self._device)
        length = tokens // len(self._mask)
        return self._mask[:, -length:].reshape(-1).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.counts.values())).device

    def _watch_attention(self, model: PreTrainedModel, blocks: dict[nn.Module, int]) -> None:
        """See queries and keys where the model's own attention function gets them."""
        config: Any = model.config
        before = config._attn_implementation
        for owner, block in blocks.items():
            for module in owner.modules():
                _WATCHED[module] = self._watcher(block)
                self._undo.callback(_WATCHED.pop, module, None)
        config._attn_implementation = _watching(before)
        self._undo.callback(setattr, config, "_attn_implementation", before)

    def _watcher(self, block: int) -> Watch:
        def watch(
            query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, sinks: Tensor | None
        ) -> None:
            length = query.shape[2]
            if length == 1:  # nobody has looked at this token yet
                return
            real = self._real(query.shape[0] * length).view(-1, length)
            self._received[block] = attention_received(query, key, scaling, mask, real, sinks)[:, -length:]

        return watch


def _mixtures(model: PreTrainedModel) -> dict[int, tuple[nn.Module, Mixture]]:
    """The blocks with routed experts. Raises `InputError` where there are none."""
    found = {}
    for block in resolve(model.config).blocks:
        mixture = mixture_of(block)
        if mixture is not None:
            found[block.index] = (model.get_submodule(block.prefix), mixture)
    if not found:
        raise InputError(f"{type(model).__name__}, which has no routed experts", "a mixture of experts")
    return found


def _skips(experts: nn.Module, mixture: Mixture) -> bool:
    """Whether the module leaves out a route behind its last expert; where not, weight zero has to do."""
    weight = next(experts.parameters())
    row = weight.new_zeros(1, mixture.stacks[0].shape[1])
    route = torch.full((1, 1), mixture.count, device=weight.device)
    try:
        with torch.no_grad():
            experts(row, route, weight.new_zeros(1, 1))
    except (IndexError, RuntimeError):
        return False
    return True


def _watching(base: str) -> str:
    """The name under which transformers finds attention `base`, watched."""
    name = base if base.startswith(PREFIX) else PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> Any:
            watch = _WATCHED.get(module)
            if watch is not None:
                scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
                watch(query, key, mask, scaling, kwargs.get("s_aux"))
            return _attention(base, module)(module, query, key, value, mask, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register(name, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attention(base: str, module: nn.Module) -> Callable[..., Any]:
    """The function itself; eager ones belong to the file of the model."""
    if base == "eager":
        function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
        return function
    return ALL_ATTENTION_FUNCTIONS[base]  # type: ignore[no-any-return]
