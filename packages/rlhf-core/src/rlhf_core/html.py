"""Pages that stand alone: HTML whose text is always escaped, one style for light and dark, no script, nothing to load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2126; --soft: #5a646e; --rule: #dde2e7; --panel: #f5f7f9;
  --good: #1a7a48; --bad: #b3362b;
  --line-0: #0b62b0; --line-1: #cf5200; --line-2: #2a7d4f; --line-3: #8a4fa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181c; --ink: #e4e8ec; --soft: #9aa5b0; --rule: #2f373f; --panel: #1c2227;
    --good: #62c68f; --bad: #f08a7e;
    --line-0: #6bb2f5; --line-1: #f7a35c; --line-2: #72cf9c; --line-3: #cc9be6;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.75rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 48rem; }
.soft, figcaption, summary, th { color: var(--soft); }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .5rem 0; padding: .75rem 1rem; overflow-x: auto; background: var(--panel); border-radius: 6px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.25rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th { font-weight: 500; }
tbody th { color: var(--ink); }
.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.25rem 2rem; }
.sample { margin: 0 0 1rem; padding: .75rem 1rem; background: var(--panel); border-radius: 6px; }
.sample p { margin: 0 0 .25rem; }
.sample p:last-child { margin: .5rem 0 0; font-size: .88rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .88rem; }
figcaption b { color: var(--ink); margin-right: .75rem; }
figcaption svg { width: 1.6rem; height: .7rem; margin: 0 .3rem 0 .6rem; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.spot { fill: transparent; stroke: none; }
.dot { stroke: none; }
.line-0 { stroke: var(--line-0); } .dot-0, .spot-0:hover { fill: var(--line-0); }
.line-1 { stroke: var(--line-1); stroke-dasharray: 7 4; } .dot-1, .spot-1:hover { fill: var(--line-1); }
.line-2 { stroke: var(--line-2); stroke-dasharray: 2 4; } .dot-2, .spot-2:hover { fill: var(--line-2); }
.line-3 { stroke: var(--line-3); stroke-dasharray: 9 3 2 3; } .dot-3, .spot-3:hover { fill: var(--line-3); }
@media print { body { padding: 0; } figure, .sample, tr { break-inside: avoid; } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for a page: nothing. Whatever a model wrote, no script runs and no address is asked."""

VOID = ("link", "meta")
"""Elements without an end."""


class Html(str):
    """Text that is HTML already: the result of `tag` or `join`, never what came from outside."""


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element: `tag("td", "a < b", class_="number")`.

    Args:
        name: of the element.
        *children: what is in it, in turn. Whatever is not `Html` is text and is escaped; None is nothing.
        **attributes: escaped too; None leaves one out. `class_` is `class`, `stroke_width` is `stroke-width`.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Several children as one."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(str(child), quote=False)
            for child in children
            if child is not None
        )
    )


def page(title: str, *children: Any) -> str:
    """A whole page with a heading."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    body = tag("body", tag("main", tag("h1", title), *children))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *children: Any) -> Html:
    """A part of a page, with its heading."""
    return tag("section", tag("h2", title), *children)


def folded(title: str, *children: Any) -> Html:
    """What is shown when its title is clicked."""
    return tag("details", tag("summary", title), *children)


def table(titles: Sequence[Any], rows: Iterable[Sequence[Any]], numbers: bool = True) -> Html:
    """A table whose rows begin with their name.

    Args:
        titles: of the columns.
        rows: cells, text or `Html`.
        numbers: whether all columns but the first hold numbers, which are lined up on the right.
    """
    kind = "number" if numbers else None
    head = tag("tr", *(tag("th", title, scope="col", class_=kind if n else None) for n, title in enumerate(titles)))
    body = (
        tag("tr", tag("th", first, scope="row"), *(tag("td", c, class_=kind) for c in rest)) for first, *rest in rows
    )
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")
