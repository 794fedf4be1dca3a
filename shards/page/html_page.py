"""Pages for people: one self-contained HTML file, in which whatever comes from outside is text and never markup.

`tag` escapes every child and attribute that is not itself made by `tag`; and the page forbids, by its content security
policy, every script and style but its own two and every request to a network. So a caption with markup in it cannot
run even where an escape were forgotten. Styles are in `web/page.css`: under this policy a `style` attribute does
nothing, so charts are drawn with SVG's own attributes (`charts.py`).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

VOID = frozenset({"br", "img", "input", "link", "meta", "hr", "col"})


class Html(str):
    """Markup that `tag` made: the only text that enters a page unescaped."""

    __slots__ = ()


Child = str | int | float | None
"""A child of an element: Html as it is, other text and numbers escaped, None left out."""


class Section(NamedTuple):
    """A part of a page: an anchor for the navigation, its heading and its content."""

    id: str
    title: str
    body: Html


def tag(name: str, /, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Children and attributes that are not Html are escaped.

    In an attribute's name `_` stands for `-`, and one at the end is dropped (`class_`, `for_`). True gives an attribute
    without a value; False and None leave it out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        word = key.rstrip("_").replace("_", "-")
        words.append(word if value is True else f'{word}="{html.escape(str(value))}"')
    start = f"<{' '.join(words)}>"
    return Html(start) if name in VOID else Html(f"{start}{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Html:
    """Children one after the other, escaped unless they are Html."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children if c is not None))


def table(head: Sequence[Child], rows: Iterable[Sequence[Child]], caption: str, *, class_: str | None = None) -> Html:
    """A table with a caption; it scrolls sideways where the screen is narrow. Numbers are set right."""
    lines = [tag("tr", *(_cell(value, place) for place, value in enumerate(row))) for row in rows]
    top = tag("thead", tag("tr", *(tag("th", value, scope="col") for value in head)))
    body = tag("table", tag("caption", caption), top, tag("tbody", *lines), class_=class_)
    return tag("div", body, class_="scroll", role="group", aria_label=caption, tabindex=0)


def _cell(value: Child, place: int) -> Html:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    shown = number(value) if is_number else value  # type: ignore[arg-type]
    if place == 0:
        return tag("th", shown, scope="row")
    return tag("td", shown, class_="num" if is_number else None)


def number(value: float) -> str:
    """A number for people: integers with separators, others with four significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def details(summary: str, *body: Child) -> Html:
    """A block that opens on request."""
    return tag("details", tag("summary", summary), *body)


def json_block(id_: str, value: Any) -> Html:
    """Data for the page's script: `JSON.parse(document.getElementById(id).textContent)`. It can't end its element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return tag("script", Html(text), type="application/json", id=id_)


def page(
    title: str,
    sections: Sequence[Section],
    *,
    lead: Child = None,
    data: Mapping[str, Any] | None = None,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
    sources: Mapping[str, str] | None = None,
    footer: Child = None,
) -> str:
    """A complete page: skip link, header, navigation, sections, footer; it needs nothing but itself.

    Args:
        title: of the page.
        sections: its parts, in order.
        lead: shown under the title.
        data: values for the scripts, by element id (see `json_block`).
        scripts: names of files in `web/` to run after `page.js`.
        styles: names of files in `web/` to apply after `page.css`.
        sources: more of the content security policy, such as {"media-src": "data:"}.
        footer: shown at the end.
    """
    style = "\n".join(asset(name) for name in ("page.css", *styles))
    script = "\n".join(asset(name) for name in ("page.js", *scripts))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script, sources or {})),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        # An icon of no bytes: a browser asks no server for one.
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(style)),
    )
    links = tag("ul", *(tag("li", tag("a", section.title, href=f"#{section.id}")) for section in sections))
    theme = tag("button", "Theme: system", type="button", id="theme", hidden=True)
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#content", class_="skip"),
        tag("header", tag("h1", title), tag("div", lead, class_="lead") if lead else None),
        tag("nav", links, theme, aria_label="Sections"),
        tag("main", *(_section(section) for section in sections), id="content", tabindex=-1),
        tag("footer", footer) if footer else None,
        *(json_block(name, value) for name, value in (data or {}).items()),
        tag("script", Html(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def asset(name: str) -> str:
    """A file of `web/`, which travels with the package."""
    return (resources.files("shards") / "web" / name).read_text(encoding="utf-8")


def _section(section: Section) -> Html:
    heading = tag("h2", section.title, id=f"{section.id}-title")
    return tag("section", heading, section.body, id=section.id, aria_labelledby=f"{section.id}-title")


def _policy(style: str, script: str, sources: Mapping[str, str]) -> str:
    def source_hash(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": source_hash(style),
        "script-src": source_hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
        **sources,
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
