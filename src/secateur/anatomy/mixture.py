"""The routed experts of a block and the router that chooses among them, read off the block's axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.anatomy.model import Block, Matrix
from secateur.core.errors import AnatomyError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mixture", "mixture_of"]


@dataclass(frozen=True)
class Mixture:
    """Routed experts whose weights lie in 3-D parameters, and their router.

    Attributes:
        space: that experts are removed from.
        count: n, how many there are.
        module: the submodule that is called with tokens, routes and weights.
        stacks: one matrix (that of the first expert) of each 3-D parameter.
        router: name of the (n, d) parameter with a row an expert.
        bias: of what the router adds to its logits, (n,), if it does.
        correction: of what it adds to its scores before it chooses, (n,), if it does.
    """

    space: str
    count: int
    module: str
    stacks: tuple[Matrix, ...]
    router: str
    bias: str | None
    correction: str | None

    @property
    def router_module(self) -> str:
        """The submodule whose input the router multiplies."""
        return self.router.rpartition(".")[0]

    def weights(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By parameter, (n, out, in): views of the matrices of all experts."""
        found = {matrix.parameter: parameters[matrix.parameter].detach() for matrix in self.stacks}
        return {
            matrix.parameter: found[matrix.parameter].mT if matrix.transposed else found[matrix.parameter]
            for matrix in self.stacks
        }


def mixture_of(block: Block) -> Mixture | None:
    """The routed experts of a block, `None` where it has none.

    The router is the matrix outside the experts' own module with a row for each expert, as wide as what the
    experts read. Raises `AnatomyError` when that is not exactly one parameter.
    """
    stacks = tuple(matrix for matrix in block.matrices if matrix.expert == 0)
    if not stacks:
        return None
    first = next(m for m in stacks if block.sites[m.input].kind == "experts_input")
    module, experts = block.sites[first.input].module, block.axes[first.parameter][0]
    outside = {name: axes for name, axes in block.axes.items() if not name.startswith(f"{module}.")}
    routers = [name for name, axes in outside.items() if axes == (experts, first.columns)]
    space = experts.segments[0].space
    if len(routers) != 1 or space is None:
        raise AnatomyError(
            f"block {block.index} has {len(routers)} matrices with a row for each expert",
            "one router",
            "its experts cannot be compared or removed",
        )
    vectors = [name for name, axes in outside.items() if axes == (experts,)]
    bias = routers[0].removesuffix("weight") + "bias"
    return Mixture(
        space=space,
        count=experts.size,
        module=module,
        stacks=stacks,
        router=routers[0],
        bias=next((name for name in vectors if name == bias), None),
        correction=next((name for name in vectors if name != bias), None),
    )
