"""MetaGPT model merging (Zhou et al., EMNLP 2024) as merge methods of MergeKit.

Once the package is installed, the stock MergeKit commands accept ``merge_method: metagpt``.
From Python:

>>> from mergekit_metagpt import scaling_coefficients
>>> scaling_coefficients([9.0, 3.0])
[0.75, 0.25]

Importing this package does not import torch or MergeKit, so that interpreters start fast.
"""

from mergekit_metagpt import startup

# Every interpreter of the environment runs this file. It does not import `typing`, which takes
# 5 ms.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from mergekit_metagpt.api.functions import merge, plan, survey
    from mergekit_metagpt.api.results import Merged, Plan, Survey
    from mergekit_metagpt.core.coefficients import scaling_coefficients
    from mergekit_metagpt.startup import register

__version__ = "0.1.0"

__all__ = [
    "Merged",
    "Plan",
    "Survey",
    "merge",
    "plan",
    "register",
    "scaling_coefficients",
    "survey",
]

_HOMES = {
    "api.functions": ("merge", "plan", "survey"),
    "api.results": ("Merged", "Plan", "Survey"),
    "core.coefficients": ("scaling_coefficients",),
    "startup": ("register",),
}

# For an interpreter that started before this package was installed, such as a notebook's.
startup.install()


def __getattr__(name: str) -> "Any":
    """Import a public name when it is first used (PEP 562)."""
    from importlib import import_module

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
