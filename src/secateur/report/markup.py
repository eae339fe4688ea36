"""HTML that cannot be built unescaped: plain strings are escaped, only `Markup` passes as it is."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

__all__ = ["Markup", "Node", "element", "join"]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Markup(str):
    """A string of HTML or SVG that is safe to insert."""

    __slots__ = ()


Node: TypeAlias = "str | Iterable[Node] | None"


def _text(value: object) -> str:
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def join(nodes: Node) -> Markup:
    """Nodes in order: `Markup` as it is, strings escaped, `None` left out, iterables flattened."""
    if nodes is None:
        return Markup("")
    if isinstance(nodes, Markup):
        return nodes
    if isinstance(nodes, str):
        return Markup(_text(nodes))
    return Markup("".join(map(join, nodes)))


def element(tag: str, *children: Node, **attributes: object) -> Markup:
    """An element; `class_` and `data_value` become `class` and `data-value`, `None` and False are left out.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is not None and value is not False:
            word = name.rstrip("_").replace("_", "-")
            parts.append(word if value is True else f'{word}="{_text(value)}"')
    return Markup(f"<{' '.join(parts)}>{join(children)}</{tag}>")
