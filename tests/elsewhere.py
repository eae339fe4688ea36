"""Fresh processes: models must load where secateur never was, and runs may be killed at any moment.

They are forks of one server, which has imported torch and transformers once and secateur never. What they
import from here must not import secateur either.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

Result = TypeVar("Result")
How = Literal["stock", "remote", "import"]
IDS = torch.arange(1, 25).view(2, 12)
MOST_SECONDS = 300
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if sys.platform != "win32":
    PROCESSES.set_forkserver_preload(["transformers.models.llama.modeling_llama", "cyclopts"])


class Loaded(NamedTuple):
    """What another process says of a model: its class, its parameters, and its logits of `IDS`."""

    name: str
    parameters: int
    logits: Tensor


def elsewhere(work: Callable[..., Result], *arguments: Any) -> Result:
    """What a module-level function gives in a process of its own; its exceptions are raised here."""
    with ProcessPoolExecutor(1, mp_context=PROCESSES) as pool:
        return pool.submit(work, *arguments).result()


def dies(place: str, number: int, work: Callable[..., object], *arguments: Any, **settings: Any) -> None:
    """Run a function in a process of its own, killed as it calls `place` for the `number`th time.

    Args:
        place: `module:function` or `module:Class.method`.
    """
    process = PROCESSES.Process(target=_die, args=(place, number, work, arguments, settings))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def together(world: int, work: Callable[..., object], *arguments: Any) -> None:
    """Run a function in several processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        PROCESSES.Process(target=_join, args=(rank, world, port, work, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(MOST_SECONDS)
        process.kill()  # one that waits for another that failed
    assert [process.exitcode for process in processes] == [0] * world


def loaded_elsewhere(folder: Path, how: How = "stock") -> Loaded:
    """A model loaded by transformers alone, with the code beside it or after `import secateur`.

    It generates the same with and without a cache, and every one of its parameters learns.
    """
    name, parameters, logits = elsewhere(_load, str(folder), how)
    return Loaded(name, parameters, torch.from_numpy(logits))


def logits_elsewhere(folders: Iterable[Path]) -> list[Tensor]:
    """Logits of `IDS` of models of stock classes, in one process."""
    return [torch.from_numpy(logits) for logits in elsewhere(_logits, [str(folder) for folder in folders])]


def _load(folder: str, how: How) -> tuple[str, int, Any]:
    if how == "import":
        import secateur  # noqa: F401
    else:
        _forbid()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=how == "remote", dtype=torch.float32
    ).eval()
    options = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    said = [model.generate(IDS, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*said)
    found = model(IDS, labels=IDS)
    found.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return type(model).__name__, parameters, found.logits.detach().numpy()


def _logits(folders: list[str]) -> list[Any]:
    _forbid()
    found = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            found.append(model(IDS, use_cache=False).logits.numpy())
    return found


def _die(place: str, number: int, work: Callable[..., object], arguments: Any, settings: Any) -> None:
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), count(1)

    def dying(*given: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given)

    setattr(owner, name, dying)
    work(*arguments, **settings)


def _join(rank: int, world: int, port: int, work: Callable[..., object], arguments: Any) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in {**where, **who}.items()})
    work(*arguments)


def _forbid() -> None:
    """From here on importing secateur fails."""
    assert "secateur" not in sys.modules
    sys.modules["secateur"] = None
