"""The Python functions behind `import secateur`: the nouns and verbs of the command line."""

from __future__ import annotations

from secateur.pipeline.catalogue import methods
from secateur.pipeline.exporting import export
from secateur.pipeline.inspect import inspect
from secateur.pipeline.online import prune_online
from secateur.pipeline.plans.planning import plan
from secateur.pipeline.run import bench, compare, evaluate, prune, recover

__all__ = [
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
