"""Open a checkpoint as a stranger would, and say how it went. Run in a process of its own by `reopen`.

Nothing but transformers is needed: secateur must not be imported here, unless weights are packed.

    python -c SOURCE FOLDER TRUST WHOLE PACKED
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

TOKENS = 8
Shapes = dict[str, list[int]]


def main(folder: str, trust: bool, whole: bool, packed: bool) -> dict[str, Any]:
    """The class that came up and what was done, or what went wrong."""
    if packed:
        import secateur  # noqa: F401 - lets transformers know the packed weights
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not whole:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        return {"class": type(model).__name__, "problem": _misfit(model, _shapes(Path(folder)))}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, dtype="auto", output_loading_info=True
    )
    odd = [f"{key.replace('_', ' ')} {sorted(map(str, names))[0]}" for key, names in info.items() if names]
    with torch.no_grad():
        logits = model.eval()(torch.arange(TOKENS)[None] % model.config.vocab_size).logits
    finite = "" if bool(torch.isfinite(logits).all()) else "logits that are not finite"
    return {"class": type(model).__name__, "problem": odd[0] if odd else finite}


def _misfit(model: Any, stored: Shapes) -> str:
    """The first tensor of another shape on disk than in the model; tensors under other names are not seen."""
    for name, tensor in model.state_dict().items():
        if name in stored and stored[name] != list(tensor.shape):
            return f"{name} is {stored[name]} on disk and {list(tensor.shape)} in the model"
    return ""


def _shapes(folder: Path) -> Shapes:
    """Of all tensors on disk, from the headers of the files; a packed one has a last axis of 0 there."""
    found: Shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        header.pop("__metadata__", None)
        found |= {name: entry["shape"] for name, entry in header.items()}
    return {name: shape[:-1] if shape and shape[-1] == 0 else shape for name, shape in found.items()}


if __name__ == "__main__":
    try:
        answer = main(sys.argv[1], sys.argv[2] == "1", sys.argv[3] == "1", sys.argv[4] == "1")
    except Exception as error:  # whatever goes wrong is the answer
        answer = {"class": "", "problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    sys.stdout.write(json.dumps(answer) + "\n")
