"""Prune a model stack and prove what each cut cost.

>>> import secateur
>>> report = secateur.prune("seedling", "pruned", method="wanda", sparsity=0.5)  # doctest: +SKIP
>>> report.perplexity_after  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur.loading import register_when_needed

if TYPE_CHECKING:
    from secateur.api import (
        bench,
        compare,
        evaluate,
        export,
        inspect,
        methods,
        plan,
        prune,
        prune_online,
        recover,
    )
    from secateur.core.errors import InputError, SecateurError
    from secateur.loading.quantizer import SecateurQuantizationConfig
    from secateur.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "InputError",
    "Recipe",
    "SecateurError",
    "SecateurQuantizationConfig",
    "__version__",
    "bench",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "methods",
    "plan",
    "prune",
    "prune_online",
    "recover",
]

_HOMES = {  # of all that needs less than `secateur.api`, which imports everything
    "InputError": "secateur.core.errors",
    "SecateurError": "secateur.core.errors",
    "Recipe": "secateur.recipe",
    "SecateurQuantizationConfig": "secateur.loading.quantizer",
    "inspect": "secateur.pipeline.inspect",
    "methods": "secateur.pipeline.catalogue",
}


register_when_needed()


def __getattr__(name: str) -> Any:
    """Load a public name at first use, so that `import secateur` and `--help` stay instant."""
    if name not in __all__:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "secateur.api")), name)
