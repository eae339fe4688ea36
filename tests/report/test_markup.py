from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from secateur.report.markup import Markup, element, join

from .reading import read

NASTY = "<script>alert(1)</script>\"'&amp;</title>"


def test_plain_text_is_escaped_in_content_and_attributes() -> None:
    page = read(element("p", NASTY, title=NASTY))
    (paragraph,) = page.elements
    assert paragraph.text == NASTY
    assert paragraph.attributes == {"title": NASTY}


def test_markup_nests_without_being_escaped_twice() -> None:
    assert element("p", "a ", element("b", "<"), [None, " c"]) == "<p>a <b>&lt;</b> c</p>"


def test_attribute_names() -> None:
    assert element("i", class_="x", data_value=3, hidden=True, id=None, aria_busy=False) == (
        '<i class="x" data-value="3" hidden></i>'
    )


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    page = read(element("p", text, title=text))
    assert len(page.elements) == 1
    assert page.elements[0].text == text
    assert page.elements[0].attributes["title"] == text


@given(st.text(alphabet=st.characters()))
def test_any_text_at_all_can_be_written(text: str) -> None:
    join(text).encode("utf-8")
    assert "\0" not in join(text)
    assert isinstance(join(text), Markup)
