"""What torch does to operations besides running them."""

from __future__ import annotations

import torch
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

__all__ = ["runs_as_called"]


def runs_as_called() -> bool:
    """Whether nothing compiles, traces, batches, differentiates or records what is called now.

    Under `torch.compile`, `torch.jit`, `torch.func` and `make_fx` code outside torch must not read the memory
    of tensors.
    """
    return not (
        torch.compiler.is_compiling()
        or _get_tracing_state() is not None
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
    )
