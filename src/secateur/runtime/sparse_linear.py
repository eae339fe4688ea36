"""Sparse weights in any model of torch, without transformers or a checkpoint."""

from __future__ import annotations

from torch import nn

from secateur.core.errors import InputError, RecipeError
from secateur.runtime import products  # noqa: F401  (what computes from packed weights)
from secateur.runtime.packed_linear import PackedLinear
from secateur.storage.formats import FORMATS, Packed

__all__ = ["SparseLinear"]


class SparseLinear(PackedLinear):
    """Takes the place of an `nn.Linear` whose weight has zeros: they take neither memory nor, on a CPU with
    its kernel, time. No gradient reaches the weight; the bias is the very parameter of the layer.

    Its `state_dict` has the packed parts. Any layer of the same shape and format reads them, also one made of
    a weight of zeros.

    Args:
        layer: a linear layer, on any device, of any floating dtype (the kernel takes 16 bits).
        format: `bitmask`, or `nm` for N:M patterns.

    Raises:
        InputError: another module, also one derived from `nn.Linear`, which may compute otherwise; too few
            zeros to be smaller packed, or no N:M pattern for `nm`.
        RecipeError: an unknown format, or one that rounds.

    >>> layer = nn.Linear(64, 64).bfloat16()
    >>> layer.weight.data[:, ::2] = 0
    >>> SparseLinear(layer)
    SparseLinear(in_features=64, out_features=64, bias=True, bitmask)
    """

    def __init__(self, layer: nn.Linear, format: str = "bitmask") -> None:
        if type(layer) is not nn.Linear:
            raise InputError(f"a {type(layer).__name__}", "an nn.Linear")
        if not FORMATS.get(format).exact:
            raise RecipeError(f"format {format!r}, which rounds", "bitmask or nm")
        weight = layer.weight.detach()
        if weight.is_meta:
            raise InputError("a layer on the meta device", "one with a weight")
        packed = Packed.of(weight.cpu(), format)
        if packed.nbytes >= weight.nbytes:
            zeros = 1 - float(weight.count_nonzero()) / max(weight.numel(), 1)
            raise InputError(
                f"a weight with {zeros:.1%} zeros",
                f"one that {format} makes smaller",
                "prune more of it, or leave the layer dense",
            )
        super().__init__(packed, weight, layer.bias)
        self.train(layer.training)
