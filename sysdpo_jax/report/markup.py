"""HTML and inline SVG as values: text is escaped unless it is already markup, and every tag is closed."""

from html import escape

VOID = ("img", "meta")


class Markup(str):
    """Text that is HTML already. Everything else is escaped when it becomes part of an element."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | int | float) -> Markup:
    """<tag attribute="...">children</tag>.

    An attribute's name loses a trailing underscore (class_) and its other underscores become hyphens.
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items()
    )
    if tag in VOID:
        return Markup(f"<{tag}{named}>")
    return Markup(f"<{tag}{named}>{join(*children)}</{tag}>")


def join(*children: str) -> Markup:
    """The children one after another, text escaped."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))
