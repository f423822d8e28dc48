"""Generated sections of documentation pages."""

from __future__ import annotations

import re


def fill(text: str, sections: dict[str, list[str]]) -> str:
    r"""Replace a page's sections, each from `<!-- name -->` to `<!-- /name -->`.

    Args:
        text: the page.
        sections: the new lines of each section, by its name.

    Returns:
        The page with its new sections. A name that the page lacks is ignored.

    Example:
        >>> fill("<!-- a -->\nold\n<!-- /a -->", {"a": ["new", ""]})
        '<!-- a -->\n\nnew\n<!-- /a -->'
    """
    for name, lines in sections.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = block.sub(
            lambda match, lines=lines: match[1] + "\n" + "\n".join(lines) + match[2], text
        )
    return text
