"""Results files: measured results between two marks, and text by people outside them."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
_BEGIN, _END = "<!-- measured -->\n", "<!-- /measured -->\n"


def write_measured(name: str, text: str) -> None:
    """Write Markdown into ``benchmarks/results/name``; keep the text outside the marks.

    Args:
        name: the file's name, with its suffix.
        text: the new results, as Markdown.
    """
    path = RESULTS / name
    before, after = "", ""
    if path.exists():
        before, _, rest = path.read_text("utf-8").partition(_BEGIN)
        after = rest.partition(_END)[2]
    path.write_text(f"{before}{_BEGIN}{text.rstrip()}\n{_END}{after}", "utf-8")


def write_raw(name: str, figures: object) -> None:
    """Write figures as JSON into ``benchmarks/results/name``."""
    (RESULTS / name).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
