"""Several processes, each with a part of the calibration windows, that end with the same sums."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Group", "local_device"]

T = TypeVar("T")


def local_device(device: torch.device) -> torch.device:
    """`cuda` without a number becomes the GPU of this process among those that `torchrun` started here."""
    if str(device) != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class Group:
    """The processes that `torchrun` started.

    Attributes:
        rank: number of this process.
        world: how many there are.

    >>> Group.from_environment(torch.device("cpu")) is None
    True
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device

    @classmethod
    def from_environment(cls, device: torch.device) -> Group | None:
        """Join the processes of `torchrun` (gloo on the CPU, NCCL on GPUs); `None` when there are no others.

        Args:
            device: of this process; where every process has a GPU of its own, `local_device` says which.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return None
        if not dist.is_initialized():
            on_gpu = device.type == "cuda"
            dist.init_process_group(
                "nccl" if on_gpu else "gloo", device_id=local_device(device) if on_gpu else None
            )
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over all processes, bit for bit the same in each."""
        moved = tensor.to(self.device)
        dist.all_reduce(moved)
        if moved is not tensor:
            tensor.copy_(moved)

    def barrier(self) -> None:
        """Wait until every process is here."""
        dist.barrier()

    def broadcast(self, value: T) -> T:
        """The value of process 0 in every process, sent as JSON: nothing is pickled."""
        text = json.dumps(value).encode() if self.rank == 0 else b""
        size = torch.tensor([len(text)], device=self.device)
        dist.broadcast(size, 0)
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == 0:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0)
        received: Any = json.loads(data.cpu().numpy().tobytes())
        return received  # type: ignore[no-any-return]

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device) -> Iterator[Group | None]:
        """The group for as long as needed; a process that ends inside it may be aborted by its threads."""
        started_before = dist.is_available() and dist.is_initialized()
        try:
            yield cls.from_environment(device)
        finally:
            if dist.is_available() and dist.is_initialized() and not started_before:
                dist.destroy_process_group()
