"""Products with packed weights, in less memory and, where the kernel computes, less time.

- `sparse_linear`: `SparseLinear`, to put into any model of torch.
- `packed_linear`, `packed_experts`: what keeps the weights of a loaded checkpoint packed.
- `products`: what computes from which format, be it `compiled`, `semi_structured`, `low_bit_linear` or
  `armor_linear`.
- `build`, `kernel`: the kernel in C++, compiled for this machine when it is first needed, and its products.
- `facts`: what computes here, in words.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.runtime.sparse_linear import SparseLinear

__all__ = ["SparseLinear"]


def __getattr__(name: str) -> Any:
    """Load the class at first use: commands that only look for the kernel need no more."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from secateur.runtime.sparse_linear import SparseLinear

    return SparseLinear
