"""What makes a folder unusable, found before any weight is read. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from secateur.checkpoint.packing import QUANT_METHOD, require_version
from secateur.checkpoint.safetensors_header import TensorInfo
from secateur.core.errors import CheckpointError

__all__ = [
    "INDEX",
    "SINGLE",
    "pop_packing",
    "read_json",
    "refuse_quantised_config",
    "refuse_quantised_tensors",
    "require_packed",
    "shard_names",
]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
QUANTISED_NAME = re.compile(
    r"[._](blocks|scales|scale_inv|qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed|weight_scale"
    r"|weight_zero_point|quant_state\..*)$"
)
BYTE_DTYPES = {"int8", "uint8"}
FLOAT8_DTYPES = {"float8_e4m3fn", "float8_e5m2"}
BEFORE = "prune the checkpoint from before quantisation, then quantise the result"
REMEDIES = {
    "mxfp4": "there is none from before: load it with "
    "quantization_config=transformers.Mxfp4Config(dequantize=True), save_pretrained that, and prune it",
}
"""What to do about methods of which a model comes in no other form."""


def read_json(path: Path, expected: str) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` when the file is missing, damaged or something else."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"no {path.name} in {path.parent}", expected) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not parse ({error})", "JSON", "copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}", "a JSON object")
    return content


def shard_names(folder: Path) -> dict[str, set[str]]:
    """Each weight file with the tensors that the index places in it (none without an index).

    Raises:
        CheckpointError: no safetensors weights, an index and a single file at odds, or a missing shard.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if single.is_file():
            return {SINGLE: set()}
        raise _no_weights(folder)
    shards = _index_by_shard(index)
    if single.is_file() and SINGLE not in shards:
        raise CheckpointError(
            f"{folder} has both {SINGLE} and {INDEX}", "one of them", "remove the stale one"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing from {folder}, the first is {missing[0]}",
            "all files that the index names",
            "copy or download them again",
        )
    return shards


def _index_by_shard(index: Path) -> dict[str, set[str]]:
    weight_map = read_json(index, "an index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "tensor names and their shards")
    shards: dict[str, set[str]] = {}
    for name, shard in sorted(weight_map.items(), key=lambda item: str(item[1])):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} places {name!r} in {shard!r}", "the name of a file beside it")
        shards.setdefault(shard, set()).add(name)
    return shards


def _no_weights(folder: Path) -> CheckpointError:
    expected = f"{SINGLE} or {INDEX}"
    if found := sorted(path.name for path in folder.glob("*.safetensors")):
        return CheckpointError(f"{folder} holds {found[0]} but neither {SINGLE} nor an index", expected)
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if not pickled:
        return CheckpointError(f"{folder} holds no weights", expected)
    return CheckpointError(
        f"{folder} holds pickled weights only ({pickled[0]})",
        expected,
        'convert them: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\", copy the tokenizer files",
    )


def pop_packing(folder: Path, config: dict[str, Any]) -> bool:
    """Take what secateur wrote of packed tensors out of a config; whether there was anything.

    Raises:
        CheckpointError: a layout that this version does not know.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        return False
    require_version(str(folder / "config.json"), found.get("version"))
    del config["quantization_config"]
    return True


def require_packed(folder: Path, packed: bool, tensors: Iterable[TensorInfo]) -> None:
    """Raises `CheckpointError` when config and files disagree on whether tensors are packed."""
    name = next((tensor.name for tensor in tensors if tensor.format), None)
    if packed and name is None:
        raise CheckpointError(
            f"config.json of {folder} tells of packed tensors and its files of none",
            "files of one checkpoint",
            "copy or download them again",
        )
    if name is not None and not packed:
        raise CheckpointError(
            f"tensor {name!r} of {folder} is packed and config.json has no quantization_config of it",
            "the config.json that was written with the files",
            "copy or download it again",
        )


def refuse_quantised_config(folder: Path, config: dict[str, Any]) -> None:
    """Raises `CheckpointError` when the config, or its text part, tells of quantised weights."""
    for part in (config, config.get("text_config")):
        quantisation = part.get("quantization_config") if isinstance(part, dict) else None
        if quantisation:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
            raise _quantised(folder, f"quantization_config: {method or 'method unknown'}", str(method))


def refuse_quantised_tensors(folder: Path, tensors: Iterable[TensorInfo]) -> None:
    """Raises `CheckpointError` when a name or a dtype tells of quantised weights."""
    for tensor in tensors:
        weight = len(tensor.shape) > 1 and tensor.name.endswith(("weight", "proj"))
        if tensor.dtype in FLOAT8_DTYPES or (tensor.dtype in BYTE_DTYPES and weight):
            raise _quantised(folder, f"{tensor.name} is {tensor.dtype}")
        if QUANTISED_NAME.search(tensor.name):
            raise _quantised(folder, f"it holds {tensor.name}")


def _quantised(folder: Path, sign: str, method: str = "") -> CheckpointError:
    return CheckpointError(
        f"{folder} is quantised ({sign})",
        "weights in bfloat16, float16 or float32",
        REMEDIES.get(method, BEFORE),
    )
