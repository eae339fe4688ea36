"""2:4 weights on a CUDA device as semi-structured tensors of torch, for the shapes where that is quicker.

torch calls its interface a prototype. Nothing here has run on a device yet: tests replace the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["Choices", "Seconds", "Timer", "convert", "fits", "seconds_on_device"]

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLES = (32, 64)
"""What rows and columns must be multiples of for either library that torch uses (CUTLASS asks for more)."""
CAPABILITY = (8, 0)
CALLS = 5

Timer = Callable[[Callable[[], Tensor]], float]
Key = tuple[int, int, torch.dtype, str]


@dataclass(frozen=True)
class Seconds:
    """One product with weights of one shape: dense, semi-structured, and unpacked for the product."""

    dense: float
    sparse: float
    unpacked: float

    @property
    def sparse_is_quicker(self) -> bool:
        """Than what is done otherwise; to keep a dense copy would take the memory that packing saves."""
        return self.sparse < self.unpacked

    @property
    def times_dense(self) -> float:
        """How many times as fast as a dense weight: below 1 the dense model is faster."""
        return self.dense / self.sparse


def fits(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch takes a 2:4 weight (outputs, inputs) of this dtype on this device."""
    whole = all(length % multiple == 0 for length, multiple in zip(shape, MULTIPLES, strict=True))
    if device.type != "cuda" or dtype not in DTYPES or not whole or 0 in shape:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= CAPABILITY


def convert(weight: Tensor) -> Tensor:
    """A 2:4 weight as a semi-structured tensor. Raises `RuntimeError` where this build of torch has none."""
    found: Tensor = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    return found


def seconds_on_device(work: Callable[[], Tensor]) -> float:
    """The least of a few calls, after one that warms up."""
    device = work().device
    seen = []
    for _ in range(CALLS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        seen.append(time.perf_counter() - started)
    return min(seen)


@dataclass
class Choices:
    """What was measured, once for each shape, dtype and device, with the rows that came first.

    Attributes:
        known: seconds, or why torch refused.
    """

    timer: Timer = seconds_on_device
    known: dict[Key, Seconds | str] = field(default_factory=dict)

    def sparse(self, shape: tuple[int, int], inputs: Tensor, weight: Callable[[], Tensor]) -> Tensor | None:
        """The semi-structured weight if that is quicker, else None.

        Args:
            shape: (outputs, columns) of the weight.
            inputs: (rows, columns) of the product at hand.
            weight: unpacks the weight, of the dtype and on the device of the inputs.
        """
        key = (*shape, inputs.dtype, str(inputs.device))
        if not self._takes(key, unless=True):
            return None
        try:
            dense = weight()
            sparse = convert(dense)
            if key not in self.known:
                self.known[key] = _measured(self.timer, inputs, dense, sparse, weight)
        except torch.OutOfMemoryError:  # of this moment; it says nothing of the shape
            return None
        except RuntimeError as error:
            self.known[key] = str(error).partition("\n")[0]
        return sparse if self._takes(key) else None

    def told(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> str | None:
        """What was chosen for a shape and why; None where it was never asked."""
        found = self.known.get((*shape, dtype, str(device)))
        return None if found is None else f"2:4 of {shape[0]} x {shape[1]} {_told(found)}"

    def _takes(self, key: Key, *, unless: bool = False) -> bool:
        found = self.known.get(key)
        return found.sparse_is_quicker if isinstance(found, Seconds) else found is None and unless


def _measured(
    timer: Timer, inputs: Tensor, dense: Tensor, sparse: Tensor, weight: Callable[[], Tensor]
) -> Seconds:
    works = (
        lambda: nn.functional.linear(inputs, dense),
        lambda: nn.functional.linear(inputs, sparse),
        lambda: nn.functional.linear(inputs, weight()),
    )
    return Seconds(*map(timer, works))


def _told(found: Seconds | str) -> str:
    if isinstance(found, str):
        return f"unpacked, torch says: {found}"
    if found.sparse_is_quicker:
        return f"semi-structured, {found.times_dense:.2f} times the speed of dense"
    return "unpacked, which is quicker"
