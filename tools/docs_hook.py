"""The site's hook: links to files outside docs/ become the file's name, as the site lacks them."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#L(\d+))?\)")


def _in_words(link: re.Match) -> str:
    line = f":{link[3]}" if link[3] else ""
    return f"{link[1]} ({link[2]}{line})"


def on_page_markdown(markdown: str, page, **_) -> str:
    """Return a page's text with every link to a file outside docs/ put in words.

    Args:
        markdown: the page's text.
        page: the page; those of the API, in a folder of their own, link within docs/.
    """
    return markdown if "/" in page.file.src_uri else _OUTSIDE.sub(_in_words, markdown)
