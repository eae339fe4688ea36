"""Packed weights in transformers: `AutoModelForCausalLM.from_pretrained(folder)` after `import secateur`.

The stock loader reads everything that is not packed. Of a packed tensor it finds a stand-in without elements
(see `checkpoint.packing`), which it brings to the right place, device and dtype; once it is done, the weights
take the places of the stand-ins: unpacked, or in a module that keeps them packed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.checkpoint.packing import QUANT_METHOD, VERSION, require_version
from secateur.core.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    # it imports models, which are not there yet when transformers asks for quantizers
    from secateur.loading.filling import Filling

__all__ = ["SecateurQuantizationConfig", "SecateurQuantizer"]

Mode = Literal["dense", "packed"]


class SecateurQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `config.json` says of packed weights, and how to load them.

    Args:
        mode: `dense` unpacks while loading; `packed` keeps the matrices of linear layers packed in memory and
            computes from them, or unpacks one at a time where nothing does.
        version, format, formats, quant_method: of the files (docs/compressed-files.md); not to be given when
            loading.

    Raises:
        InputError: another mode or option, or a version of the layout that is not known.

    >>> how = secateur.SecateurQuantizationConfig(mode="packed")  # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)  # doctest: +SKIP
    """

    def __init__(
        self,
        mode: Mode = "dense",
        version: int = VERSION,
        format: str = "bitmask",
        formats: dict[str, str] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise InputError(f"option {', '.join(map(repr, sorted(unknown)))}", "mode")
        if mode not in ("dense", "packed"):
            raise InputError(f"mode {mode!r}", "dense or packed")
        require_version("the quantization_config", version)
        self.quant_method: Any = quant_method
        self.mode, self.version, self.format, self.formats = mode, version, format, formats or {}

    @property
    def dequantize(self) -> bool:
        """Tells transformers that the loaded model is an ordinary one."""
        return self.mode == "dense"

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the caller of `from_pretrained` decides, whatever the files say."""
        return {"mode": self.mode}


class SecateurQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed weights into a model that transformers has loaded around them."""

    requires_calibration = True
    _filling: Filling
    _dtypes: dict[str, torch.dtype]

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises `InputError` for an offloaded model, whose weights are not where they could be filled in."""
        places = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise InputError(
                "packed weights with a device_map that offloads to the CPU or the disk",
                "room for the model on the devices",
                "run: secateur export MODEL --format dense -o OUT, and load that",
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Lets stand-ins through, whose shape is not that of the parameter."""
        return self._filling.place_of(param_name) is not None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from secateur.loading.filling import Filling

        if not checkpoint_files:
            raise CheckpointError("packed weights without files", "the folder or hub id of a checkpoint")
        self._filling = Filling(Path(checkpoint_files[0]).parent, model.config)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        parts = {
            re.escape(part.name.rpartition(".")[2])
            for info in self._filling.checkpoint.tensors.values()
            for part in info.parts
            if part.name != info.name
        }
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {rf"\.({'|'.join(sorted(parts))})$"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        packed = self.quantization_config.mode == "packed"
        if not hasattr(HfQuantizer, "get_new_dtype"):
            self._cast_renamed(model)
        self._filling.fill(model, keep_packed=packed)
        del self._filling, self._dtypes, model._keys_to_ignore_on_load_unexpected
        if not packed:
            self.remove_quantization_config(model)
        return model

    def _cast_renamed(self, model: Any) -> None:
        """Give parameters whose names in the files are others the dtype that was asked for: transformers
        without `get_new_dtype` leaves them in that of the files when weights are packed."""
        exact = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
        for name, parameter in model.named_parameters():
            dtype = self._dtypes.get(name, parameter.dtype)
            if parameter.is_floating_point() and not any(part in name for part in exact):
                parameter.data = parameter.data.to(dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` is refused while weights are packed: the folder is there already."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _register() -> None:
    """Make both known to transformers."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SecateurQuantizationConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SecateurQuantizer
    # whose `get_loading_attributes` count when files have a configuration of their own
    others = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*others, SecateurQuantizationConfig)


_register()
