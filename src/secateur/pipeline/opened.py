"""A model folder with everything that is known about it before a weight is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from secateur.anatomy.config import longest_input, values_of
from secateur.anatomy.layout import FileLayout
from secateur.anatomy.model import Anatomy
from secateur.anatomy.refusal import one_line
from secateur.anatomy.resolve import resolve
from secateur.calibration.source import FolderSource
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.safetensors_file import torch_dtype
from secateur.core.errors import CheckpointError, InputError

__all__ = ["Opened", "choose_device", "choose_dtype", "open_model"]


@dataclass
class Opened:
    """A checkpoint folder, its anatomy, and how the two correspond."""

    name: str
    checkpoint: Checkpoint
    config: Any
    anatomy: Anatomy
    layout: FileLayout
    _first_sources: dict[tuple[torch.device, torch.dtype], FolderSource] = field(
        default_factory=dict, repr=False
    )

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder. Raises `CheckpointError` when there is none or it does not fit."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"no usable tokenizer in {self.folder} ({str(error).splitlines()[0]})",
                "tokenizer.json or its relatives beside the weights",
                "copy the tokenizer files of the original model there",
            ) from error
        vocabulary = self.anatomy.spaces.get("vocab") or self.config.vocab_size
        # tokens added beyond the model's vocabulary are common, and harmless until one is used
        entries = tokenizer.vocab_size
        if entries > vocabulary:
            raise CheckpointError(
                f"the tokenizer of {self.folder} has {entries} entries and the model {vocabulary}",
                "a tokenizer that fits the model",
                "copy the tokenizer files of the original model there",
            )
        return tokenizer

    @property
    def stored_dtype(self) -> torch.dtype:
        """The floating dtype of the files."""
        tensors = self.checkpoint.tensors.values()
        return torch_dtype(next(info.dtype for info in tensors if info.is_floating_point))

    def source(
        self,
        device: torch.device,
        dtype: torch.dtype,
        read: Callable[[int], dict[str, Tensor] | None] | None = None,
    ) -> FolderSource:
        """A stream of its blocks; `read(i)` may supply the file tensors of block i from elsewhere.

        All streams of one folder share what stands outside the blocks.
        """
        first = self._first_sources.get((device, dtype))
        source = FolderSource(self.checkpoint, device=device, dtype=dtype, read=read, outer_of=first)
        self._first_sources.setdefault((device, dtype), source)
        return source

    def share_outer(self, other: Opened) -> None:
        """Use the embeddings, norm and head that `other` has in memory: those of the two are equal."""
        self._first_sources = other._first_sources

    def load(
        self, dtype: torch.dtype, device: torch.device, *, spread: bool = False, packed: bool = False
    ) -> PreTrainedModel:
        """The whole model in memory, through the stock loader.

        Args:
            spread: accelerate places its blocks on all GPUs.
            packed: linear layers keep weights packed that are so in the files.
        """
        config = copy.deepcopy(self.config)
        if packed and self.checkpoint.formats:
            config.quantization_config["mode"] = "packed"
        with _no_bars():
            if spread:
                return AutoModelForCausalLM.from_pretrained(
                    self.folder, config=config, dtype=dtype, device_map="auto"
                ).eval()
            model = AutoModelForCausalLM.from_pretrained(self.folder, config=config, dtype=dtype)
        return model.to(device).eval()

    @property
    def max_length(self) -> int:
        """The longest window the model accepts."""
        return longest_input(values_of(self.config))


@contextmanager
def _no_bars() -> Iterator[None]:
    """Loading shows no bar of its own; what the caller had set comes back."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def open_model(name: str | Path) -> Opened:
    """Open a local folder, a hub id or `seedling`: headers and configuration only.

    Raises:
        CheckpointError: files that are missing, damaged or quantised.
        AnatomyError: an architecture that is not known well enough.
    """
    checkpoint = Checkpoint.open(name)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"config.json of {checkpoint.folder} is not understood ({str(error).splitlines()[0]})",
            "a model type that the installed transformers knows",
            "upgrade transformers, or check model_type",
        ) from error
    except StrictDataclassError as error:
        raise CheckpointError(
            f"config.json of {checkpoint.folder} is refused by transformers ({one_line(error)})",
            "values that its configuration class accepts",
            "copy or download it again",
        ) from error
    anatomy = resolve(config)
    layout = FileLayout(anatomy, checkpoint.shapes)
    return Opened(str(name), checkpoint, config, anatomy, layout)


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU when there is one. Raises `InputError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r}", "auto, cpu, cuda or cuda:n") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r}", "auto, cpu, cuda or cuda:n")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name!r} on a machine with {torch.cuda.device_count()} CUDA devices",
            "a device that is there",
            "use --device cpu",
        )
    return device


def choose_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The computing precision: `auto` is float32 on the CPU and the stored one on a GPU."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    return torch.float32 if device.type == "cpu" else stored
