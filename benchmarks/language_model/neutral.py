"""Neutral text: what a merge should not have forgotten."""

import re
from pydoc_data.topics import topics

_SHORTEST, _LONGEST = 50, 120  # words


def passages(count: int) -> list[str]:
    """Return the first paragraphs of 50 to 120 words of Python's language reference.

    Every Python has it, as the text of ``help("topics")``; it differs a little between versions.
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    prose = [it for it in paragraphs if _SHORTEST <= len(it.split()) <= _LONGEST]
    return list(dict.fromkeys(prose))[:count]
