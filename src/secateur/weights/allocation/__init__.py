"""How a sparsity is spread over the blocks of a model, one file each."""

from secateur.weights.allocation.base import ALLOCATIONS, Allocation, register

__all__ = ["ALLOCATIONS", "Allocation", "register"]
