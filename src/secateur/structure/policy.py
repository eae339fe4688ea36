"""Small networks that score the rows of matrices, and how rows are drawn from their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from secateur.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Network", "Policy", "gumbel", "log_probability", "logistic"]

Network = Literal["linear", "factored", "mlp"]
HIDDEN = 32
NAMES: dict[frozenset[str], Network] = {
    frozenset("uc"): "linear",
    frozenset("Abv"): "factored",
    frozenset("Abvc"): "mlp",
}


@dataclass(frozen=True)
class Policy:
    """Scores rows and knows nothing of the block they stand in (prunenet, section 2.1).

    A state is (P, F, d): P matrices whose F rows belong together, each with entries of mean square 1.

    Attributes:
        tensors: its parameters.
            linear: `u`, `c`; z = X u + c on the P d entries of a row.
            factored: `A`, `b`, `v`; z = (X A^T + b) v with A (F, P d), the two layers of the paper, which
            come to a linear policy.
            mlp: `A`, `b`, `v`, `c`; one hidden layer, which also sees the P norms of a row.
    """

    tensors: Mapping[str, Tensor]

    @classmethod
    def fresh(cls, network: Network, shape: tuple[int, int, int], generator: torch.Generator) -> Policy:
        """Random, for states of this shape; scores are small, so that no row is settled from the start."""
        import torch

        parts, rows, columns = shape
        width = parts * columns
        shapes: dict[str, tuple[int, ...]] = {"u": (width,), "c": ()}
        if network != "linear":
            hidden, extra = (rows, 0) if network == "factored" else (HIDDEN, parts)
            shapes = {"A": (hidden, width + extra), "b": (hidden,), "v": (hidden,), "c": ()}
            shapes = {name: shapes[name] for name in ("Abv" if network == "factored" else "Abvc")}
        reach = {"u": 1 / width, "A": width**-0.5, "v": 1 / shapes.get("v", (1,))[0], "b": 0.0, "c": 0.0}
        draws = {name: 2 * torch.rand(size, generator=generator) - 1 for name, size in shapes.items()}
        return cls({name: draw * reach[name] for name, draw in draws.items()})

    @classmethod
    def load(cls, path: Path) -> Policy:
        """A policy that a run has written. Raises `InputError`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is no policy ({error})", "policy.safetensors of a run") from error
        policy = cls.of(found)
        if frozenset(policy.tensors) not in NAMES:
            raise InputError(f"{path} holds {', '.join(sorted(found))}", "policy.safetensors of a run")
        return policy

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device | None = None) -> Policy:
        """The parameters among these tensors: those with names of one letter."""
        return cls({name: tensor.to(device) for name, tensor in tensors.items() if len(name) == 1})

    @property
    def network(self) -> Network:
        return NAMES[frozenset(self.tensors)]

    @property
    def width(self) -> int:
        """Numbers of a row that it reads."""
        return int(self.tensors["u" if "u" in self.tensors else "A"].shape[-1])

    @property
    def rows(self) -> int | None:
        """How many rows a state must have, if that matters."""
        return len(self.tensors["v"]) if self.network == "factored" else None

    def require_fit(self, name: str, matrices: Sequence[Tensor]) -> None:
        """Refuse rows that are not those it reads, of the first matrix or of all.

        Args:
            name: of the policy, for the message.
            matrices: (F, d) each.

        Raises:
            InputError: a policy of another width or, where that matters, number of rows.
        """
        (rows, columns), parts = matrices[0].shape, len(matrices)
        if (self.reads(1, columns) or self.reads(parts, columns)) and self.rows in (None, rows):
            return
        own, asked = (f" in {count} rows" if self.rows else "" for count in (self.rows, rows))
        more = int(self.network == "mlp")
        raise InputError(
            f"policy {name} reads {self.width} numbers a row{own}",
            f"{columns + more} or {parts * (columns + more)}{asked} for this model",
            "leave policy out to learn one",
        )

    def reads(self, parts: int, columns: int) -> bool:
        """Whether rows of so many matrices of so many columns are what it reads."""
        return self.width == parts * (columns + int(self.network == "mlp"))

    def copy(self) -> Policy:
        """As it is now, whatever happens to its parameters."""
        return Policy({name: tensor.detach().clone() for name, tensor in self.tensors.items()})

    def logits(self, state: Tensor) -> Tensor:
        """(F,) scores of the rows of a state (P, F, d); higher stay."""
        import torch

        rows, own = state.transpose(0, 1).flatten(1), self.tensors
        if self.network == "linear":
            return rows @ own["u"] + own["c"]
        if self.network == "factored":
            return rows @ (own["A"].T @ own["v"]) + own["b"] @ own["v"]
        norms = state.norm(dim=2)
        norms = (norms - norms.mean(1, keepdim=True)) / norms.std(1, keepdim=True).clamp_min(1e-6)
        seen = torch.cat([rows / rows.shape[1] ** 0.5, norms.T], 1)
        return torch.nn.functional.gelu(seen @ own["A"].T + own["b"]) @ own["v"] + own["c"]


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise with which the k largest of s + noise are k draws without replacement from softmax(s)."""
    import torch

    return -torch.empty(shape).exponential_(generator=generator).log()


def logistic(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The logit of uniform noise."""
    import torch

    return torch.rand(shape, generator=generator).clamp(1e-7, 1 - 1e-7).logit()


def log_probability(logits: Tensor, orders: Tensor, count: int) -> Tensor:
    """(m,) log-probabilities of drawing the first `count` of each order without replacement from softmax
    of the logits (Plackett-Luce; prunenet, section 2.5).

    Args:
        logits: (F,).
        orders: (m, F) permutations.
    """
    drawn = logits[orders]
    rest = drawn.flip(-1).logcumsumexp(-1).flip(-1)
    return (drawn - rest)[:, :count].sum(-1)
