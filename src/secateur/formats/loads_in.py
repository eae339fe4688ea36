"""Which engines load a checkpoint, as its configuration and the names of its tensors tell. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from secateur.core.errors import InputError
from secateur.formats.fit import fit
from secateur.formats.form import Form
from secateur.loading import CODE, MODEL_TYPE, OWN_HEADS, PACKED_CODE

__all__ = ["loads_in"]

UNPACK = "`secateur export --format dense` writes ordinary files"
NOT_TRIED = "not tried here"
STATED_HEAD_DIM = ("llama", "mistral", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mixtral", "phi3")
"""Families whose classes in vLLM take the width of a head from the config; others divide hidden_size."""


def loads_in(
    config: Mapping[str, Any], tensors: Iterable[str], *, formats: Iterable[str] = ()
) -> dict[str, str]:
    """`yes: ...` or `no: ...` of transformers, vllm and gguf.

    Args:
        config: the content of config.json.
        tensors: names on disk.
        formats: of the tensors that are packed.

    >>> loads_in({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, [])["transformers"]
    'yes: stock class LlamaForCausalLM'
    """
    form = Form.of(config, tensors)
    kinds = sorted(set(formats))
    answers = {
        "transformers": _transformers(config),
        "vllm": _vllm(config, form),
        "gguf": _gguf(config, form),
    }
    if kinds:
        packed = f"weights are packed ({', '.join(kinds)})"
        answers["transformers"] = f"yes: {PACKED_CODE}, {packed}"
        answers["vllm"] = f"no: {packed}; {UNPACK}"
    return answers


def _transformers(config: Mapping[str, Any]) -> str:
    if config.get("model_type") == MODEL_TYPE:
        return f"yes: {CODE}"
    return f"yes: stock class {_class_name(config)}"


def _class_name(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [f"of {config.get('model_type')}"])[0])


def _vllm(config: Mapping[str, Any], form: Form | None) -> str:
    if config.get("model_type") == MODEL_TYPE:
        if form is not None and form.sliced:
            return f"no: each half of a block has a basis of its own ({NOT_TRIED})"
        why = "blocks differ in size"
        if form is not None and form.even:
            own = bool(config.get(OWN_HEADS))
            why = "fewer heads than its class can have" if own else "biases that its class does not have"
        return f"no: {why} (`secateur export --format dense` pads them where it can; {NOT_TRIED})"
    if form is not None and not form.square and form.family not in STATED_HEAD_DIM:
        return f"no: its {form.family} class divides hidden_size by the heads ({NOT_TRIED})"
    return f"yes, where it serves the dense model: stock class and keys ({NOT_TRIED})"


def _gguf(config: Mapping[str, Any], form: Form | None) -> str:
    try:
        found = fit(form, str(config.get("model_type")))
    except (InputError, KeyError, ValueError, TypeError) as error:
        reason = error.seen if isinstance(error, InputError) else f"the config has no usable {error}"
        return f"no: {reason} ({NOT_TRIED})"
    return f"yes: by `secateur export`, architecture {found.name} of llama.cpp ({NOT_TRIED})"
