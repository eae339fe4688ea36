"""What the router of a mixture asks of the number of its experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secateur.anatomy.family import load_family
from secateur.anatomy.model import Anatomy

__all__ = ["RouterRules", "router_rules"]

VISITED_IN_GROUP = 2  # a group is rated by its best two (DeepSeek-V3)


@dataclass(frozen=True)
class RouterRules:
    """What a router needs to work.

    Attributes:
        top_k: experts that a token visits.
        groups: experts stand in so many groups of one size, one after the other.
        visited_groups: groups that a token may visit.
    """

    top_k: int
    groups: int = 1
    visited_groups: int = 1

    @property
    def least(self) -> int:
        """The fewest experts that can stay in a block."""
        if self.groups == 1:
            return self.top_k
        return self.groups * max(VISITED_IN_GROUP, -(-self.top_k // self.visited_groups))


def router_rules(anatomy: Anatomy, config: Any) -> RouterRules | None:
    """The rules of a model, `None` where its family file names no router.

    Args:
        config: the configuration object.
    """
    family = load_family(anatomy.family)
    keys = family.experts if family else None
    if keys is None:
        return None
    grouped = [getattr(config, key, None) or 1 for key in (keys.groups, keys.visited_groups) if key]
    return RouterRules(int(getattr(config, keys.visited)), *map(int, grouped))
