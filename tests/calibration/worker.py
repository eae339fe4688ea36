"""What each of two processes does in `test_distributed.py`; process 0 leaves the results."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import VOCAB, tiny_model
from torch import Tensor

from secateur.anatomy.members import members
from secateur.calibration.distributed import Group
from secateur.calibration.driver import Driver
from secateur.calibration.gradients import collect_gradients
from secateur.calibration.source import MemorySource
from secateur.calibration.taylor import collect_taylor
from secateur.calibration.windows import Windows
from secateur.core.statistics import BACKWARD, ROUTED

FAMILY = "qwen3_moe"
COUNT = 5


def windows() -> Windows:
    return Windows.of(torch.randint(0, VOCAB, (COUNT, 12), generator=torch.Generator().manual_seed(0)))


def results(part: Windows, group: Group | None, folder: Path) -> dict[str, Tensor]:
    """Statistics, errors, gradients and Taylor terms by name."""
    found: dict[str, Tensor] = {}
    for block in Driver(MemorySource(tiny_model(FAMILY)), part, batch_size=1, group=group).blocks():
        for site, several in block.observe({"second_moment", "mean", "hessian"}).items():
            for expert, one in enumerate(several):
                name = f"{block.index}.{site}.{expert}"
                found[f"{name}.counts"] = torch.tensor([one.tokens, one.sequences])
                found |= {f"{name}.square": one.second_moment, f"{name}.sum": one.mean}
                found[f"{name}.hessian"] = one.hessian
        routing = block.observe_routing(ROUTED)
        assert routing is not None
        found[f"{block.index}.routed"] = torch.tensor(routing.tokens)
        for name in ("coactivation", "probabilities", "gates", "ratios", "norms", "means"):
            found[f"{block.index}.{name}"] = getattr(routing, name)
        for matrix in block.block.matrices:
            matrix.view(block.parameters)[:, ::2] = 0
        found[f"{block.index}.error"] = torch.tensor(block.finish())
    store = collect_gradients(
        MemorySource(tiny_model(FAMILY)), part, norm="l2", folder=folder, budget_bytes=1, group=group
    )
    found["meta"] = torch.tensor([store.meta[key] for key in ("sequences", "tokens", "loss")])
    found |= {f"gradient.{name}": tensor for name, tensor in store.load(1).items()}
    source = MemorySource(tiny_model("llama"))
    taylor = collect_taylor(
        source,
        part,
        terms=BACKWARD - {"gradient"},
        wanted=[members(block, ["ffn", "heads"]) for block in source.anatomy.blocks],
        scratch=folder,
        budget_bytes=1,
        group=group,
    )
    found["taylor.loss"] = torch.tensor(taylor.loss)
    for one in taylor.blocks[0]:
        found |= {f"taylor.{one.member.module}.{term}": values for term, values in one.terms.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def work(folder: Path) -> None:
    with Group.joined(torch.device("cpu")) as group:
        assert group is not None
        sent = {"parts": ["block-00000"], "loss": 0.1, "none": None}
        assert group.broadcast(sent if group.rank == 0 else {}) == sent
        found = results(windows().shard(group.rank, group.world), group, folder / "gradients")
        save_file(found, folder / f"process-{group.rank}.safetensors")
        group.barrier()
