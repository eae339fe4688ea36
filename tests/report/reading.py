"""Reading a page back the way a browser does, with the standard parser."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """Elements in order, each with the text inside it; `unclosed` and `stray` are empty in a sound page."""

    elements: list[Element] = field(default_factory=list)
    unclosed: list[Element] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag != "meta":
            self.unclosed.append(element)

    def handle_endtag(self, tag: str) -> None:
        if self.unclosed and self.unclosed[-1].tag == tag:
            self.unclosed.pop()
        else:
            self.stray.append(tag)

    def handle_data(self, data: str) -> None:
        for element in self.unclosed:
            element.text += data

    def all(self, tag: str, class_: str = "") -> list[Element]:
        wanted = set(class_.split())
        return [
            e for e in self.elements if e.tag == tag and wanted <= set(e.attributes.get("class", "").split())
        ]

    def text(self) -> str:
        return self.all("main")[0].text

    def numbers(self) -> set[float]:
        """Exact values of `data` elements, and every number in the text."""
        texts = [self.text(), *(e.text for e in self.all("data"))]
        words = [word for text in texts for word in NUMBER.findall(text)]
        return self.exact() | {float(word.replace(",", "").replace("−", "-")) for word in words}

    def exact(self) -> set[float]:
        return {float(e.attributes["value"]) for e in self.all("data")}


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page
