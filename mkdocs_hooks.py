"""What the site says in another way than the pages on GitHub."""

import re
from typing import Any

# A link from a page to a file of the repository that is no page.
SOURCE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:sysdpo_jax|experiments|tests)/[^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the paths of such files in the place of links, which would lead out of the site."""
    return SOURCE.sub(r"\1 (`\2`)", markdown)
