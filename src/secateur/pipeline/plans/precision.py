"""What weights in few bits will take, before one is read."""

from __future__ import annotations

from typing import Any

from secateur.experts.precision import PrecisionMethod
from secateur.formats.loads_in import loads_in
from secateur.pipeline.opened import Opened
from secateur.report.effect import effect

__all__ = ["precision_outcome"]

LAYOUT_BYTES = 16
"""Of a packed tensor: its layout and checksum."""


def precision_outcome(opened: Opened, method: PrecisionMethod) -> dict[str, Any]:
    """The facts of `secateur plan`; the bits of experts are those asked for, which may not all be spent."""
    checkpoint = opened.checkpoint
    after = checkpoint.nbytes - round(_freed_bytes(opened, method))
    loads = loads_in(checkpoint.config, checkpoint.tensors)
    return {
        "sparsity": 0.0,
        "parameters_prunable": opened.anatomy.prunable_parameters,
        "zeros_after": 0,
        "parameters_after": checkpoint.parameters,
        "bytes_after": after,
        "faster": False,
        "effect": effect(
            "unstructured", 0.0, removes=method.removes, bytes_before=checkpoint.nbytes, bytes_after=after
        ),
        "loads_in": {
            "transformers": "yes, after `import secateur`",
            "vllm": "unpacked: `secateur export --format dense`",
            "gguf": loads["gguf"],
        },
    }


def _freed_bytes(opened: Opened, method: PrecisionMethod) -> float:
    freed = 0.0
    sparse = any(matrix.expert is not None for block in opened.anatomy.blocks for matrix in block.matrices)
    for block in opened.anatomy.blocks:
        for matrix in block.matrices:
            bits = method.average_bits if matrix.expert is not None or not sparse else method.dense_bits
            if bits:
                rows, columns = matrix.shape
                groups = rows * -(-columns // method.group_size)
                stored = matrix.size * bits / 8 + groups * (2 if bits == 1 else 4) + LAYOUT_BYTES
                freed += matrix.size * opened.stored_dtype.itemsize - stored
    return freed
