"""Tensors that lie packed in a file: what the header says of them, and what a format must do.

A packed tensor X is stored as X itself with a last axis of length 0 (no bytes: it states shape and dtype, and
whoever does not know the format stops at the wrong shape), its parts `X.<part>`, and `X.crc32`. The formats
are named under `secateur` in the metadata of the file. Formats live in `storage`, a floor above. Needs no
torch to be imported.
"""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.core.errors import CheckpointError
from secateur.core.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from secateur.core.pattern import Pattern

__all__ = [
    "CHECKSUM",
    "DENSE",
    "FORMATS",
    "METADATA_KEY",
    "QUANT_METHOD",
    "VERSION",
    "Format",
    "Packed",
    "config_entry",
    "formats_in",
    "metadata_of",
    "refused",
    "require_version",
]

VERSION = 1
"""Of the layout; readers refuse any other."""
QUANT_METHOD = METADATA_KEY = "secateur"
CHECKSUM = "crc32"
DENSE = "dense"
"""Stands where a format is asked for and tensors are to be stored as they are."""


class Format(ABC):
    """One way to store a tensor as parts. Registered under its `id` with `FORMATS.register`.

    Class variables:
        id: name on the command line, in config.json and in the files.
        parts: the parts that a packed tensor of this format always has.
        typed: those parts that are of the dtype of the tensor.
        exact: `unpack` gives back what `pack` was given; others are for methods that round.
        others: formats that serve tensors which this one does not make smaller, where this one is asked for.
        variant: it is among the `others` of a format, and not asked for by itself.
    """

    id: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    typed: ClassVar[tuple[str, ...]] = ()
    exact: ClassVar[bool] = True
    others: ClassVar[tuple[str, ...]] = ()
    variant: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def pack(cls, weight: Tensor, **meta: Any) -> dict[str, Tensor]:
        """The parts of a tensor of any shape and floating dtype, on the CPU.

        Args:
            weight: what `unpack` gives back, exactly or as closely as the format can.
            meta: what the format needs to know beside it.

        Raises:
            InputError: a tensor that the format cannot hold.
        """

    @classmethod
    @abstractmethod
    def unpack(cls, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of `shape` and `dtype`, on the device of its parts, which passed `check`."""

    @classmethod
    @abstractmethod
    def check(cls, parts: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
        """Raises `InputError` naming the tensor when its parts cannot be what `pack` gives (use `refused`).

        All of `cls.parts` are there, and their bytes are those that were written.
        """

    @classmethod
    def expected_bytes(
        cls, shape: tuple[int, ...], itemsize: int, sparsity: float, pattern: Pattern
    ) -> int | None:
        """Of the parts of a tensor that is yet to be pruned to this; None where that is not known."""
        return None


FORMATS: Registry[type[Format]] = Registry(
    "format",
    "secateur.formats",
    {
        "bitmask": "secateur.storage.bitmask",
        "nm": "secateur.storage.nm",
        "nm-columns": "secateur.storage.nm",
        "armor": "secateur.storage.armor",
        "low-bit": "secateur.storage.low_bit",
        "low-bit-stack": "secateur.storage.low_bit",
    },
)
"""Formats of tensors; packages add theirs by the entry point group `secateur.formats`."""


@dataclass(frozen=True)
class Packed:
    """A packed tensor in memory.

    Attributes:
        format: id of its format.
        shape, dtype: of the tensor that it stands for.
        parts: by name; the checksum is not among them.
    """

    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @classmethod
    def of(cls, weight: Tensor, format: str, **meta: Any) -> Packed:
        """Raises `InputError`: a tensor that the format cannot hold, or an unknown format."""
        return cls(format, tuple(weight.shape), weight.dtype, FORMATS.get(format).pack(weight, **meta))

    @property
    def nbytes(self) -> int:
        """Bytes of the parts; a file has 8 more for the checksum, and the entries of its header."""
        return sum(part.nbytes for part in self.parts.values())

    def unpack(self) -> Tensor:
        """What it stands for, on the device of the parts."""
        return FORMATS.get(self.format).unpack(self.parts, self.shape, self.dtype)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors of the file by name."""
        import torch

        parts = {f"{name}.{part}": tensor for part, tensor in self.parts.items()}
        return {
            name: torch.empty((*self.shape, 0), dtype=self.dtype),
            **parts,
            f"{name}.{CHECKSUM}": torch.tensor([_checksum(self.parts)]),
        }

    @classmethod
    def read(cls, name: str, format: str, stored: Mapping[str, Tensor]) -> Packed:
        """From the tensors of the file.

        Raises:
            CheckpointError, InputError: parts that were changed or cannot be of this tensor.
        """
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key != name}
        expected = parts.pop(CHECKSUM)
        for part in FORMATS.get(format).parts:
            if part not in parts:
                raise refused(name, f"{name}.{part} is missing")
        if expected.tolist() != [_checksum(parts)]:
            raise refused(name, "the bytes of its parts do not have the checksum that was stored")
        shape, dtype = tuple(stored[name].shape[:-1]), stored[name].dtype
        for part in FORMATS.get(format).typed:
            if part in parts and parts[part].dtype != dtype:
                raise refused(name, f"{name}.{part} is {parts[part].dtype} in place of {dtype}")
        FORMATS.get(format).check(parts, name, shape)
        return cls(format, shape, dtype, parts)


def refused(name: str, why: str) -> CheckpointError:
    """For a packed tensor that is not what it should be."""
    return CheckpointError(
        f"packed tensor {name!r} is damaged: {why}", "the files as written", "copy or download them again"
    )


def config_entry(formats: Mapping[str, str]) -> dict[str, Any]:
    """`quantization_config` of a checkpoint from the formats of its packed tensors by name: the most frequent
    format, and under `formats` the tensors of another one. Shapes and dtypes are in the files."""
    counts = Counter(formats.values())
    usual = min(counts, key=lambda format: (-counts[format], format))
    others = {name: format for name, format in formats.items() if format != usual}
    entry = {"quant_method": QUANT_METHOD, "version": VERSION, "format": usual}
    return {**entry, "formats": others} if others else entry


def metadata_of(formats: Mapping[str, str]) -> dict[str, str]:
    """What the metadata of a file says of its packed tensors, from their formats by name."""
    if not formats:
        return {}
    return {METADATA_KEY: json.dumps({"version": VERSION, "formats": dict(formats)}, separators=(",", ":"))}


def formats_in(where: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The inverse of `metadata_of`: formats by the names of packed tensors, nothing in an ordinary file.

    Args:
        where: the file, for messages.

    Raises:
        CheckpointError: a layout that this version does not know.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        content = json.loads(metadata[METADATA_KEY])
        version, formats = content["version"], {key: str(form) for key, form in content["formats"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"what {where} says of its packed tensors does not parse ({error})",
            "a file as secateur writes it",
            "copy or download it again",
        ) from error
    require_version(where, version)
    for format in dict.fromkeys(formats.values()):
        if format not in FORMATS:
            raise _unknown(next(name for name in formats if formats[name] == format), format)
    return formats


def require_version(where: str, version: Any) -> None:
    """Raises `CheckpointError` for a layout of another version."""
    if version != VERSION:
        raise CheckpointError(
            f"{where} is packed in layout version {version!r}",
            f"version {VERSION}",
            "install the secateur that wrote it, and run: secateur export MODEL --format dense -o OUT",
        )


def _unknown(name: str, format: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} is packed in format {format!r}",
        " or ".join(FORMATS.names()),
        "install the package that wrote it",
    )


def _checksum(parts: Mapping[str, Tensor]) -> int:
    """CRC-32 of the bytes of all parts, in the order of their names."""
    import torch

    value = 0
    for _, part in sorted(parts.items()):
        flat = part.detach().cpu().contiguous().view(-1)
        value = zlib.crc32(flat.view(torch.uint8).numpy().data, value)
    return value
