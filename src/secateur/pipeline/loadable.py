"""Where a finished checkpoint loads: transformers tried, the others judged from the configuration."""

from __future__ import annotations

from secateur.anatomy.resized import is_stock
from secateur.evaluation import reopen
from secateur.evaluation.memory import available_memory_bytes
from secateur.formats.loads_in import loads_in
from secateur.pipeline.opened import Opened

__all__ = ["found_to_load"]


def found_to_load(model: Opened, *, try_it: bool = True) -> dict[str, str]:
    """`yes: ...` or `no: ...` of transformers, vllm and gguf.

    Args:
        model: the files as they will be published, with the code they bring along.
        try_it: open them in a fresh process with transformers alone, packed ones after `import secateur`.
    """
    checkpoint = model.checkpoint
    answers = loads_in(checkpoint.config, checkpoint.tensors, formats=checkpoint.formats.values())
    if try_it:
        answers["transformers"] = reopen.reopen(
            checkpoint.folder,
            own_code=not is_stock(checkpoint.config),
            packed=bool(checkpoint.formats),
            nbytes=checkpoint.dense_nbytes,
            free_bytes=available_memory_bytes(),
        )
    return answers
