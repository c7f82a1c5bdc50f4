"""How stock MergeKit finds the methods of this package.

MergeKit 0.1.5 has no plugin entry point. A start-up file beside this package (read by
``site`` when an interpreter starts) calls :func:`install`, which puts a finder on
``sys.meta_path``. The finder does nothing until MergeKit is imported, and then lets the
package register itself as soon as MergeKit's method registry has been executed.

This module runs in *every* interpreter of the environment: it imports nothing that the
interpreter has not imported already, and raises nothing.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_SWITCH = "MERGEKIT_METAGPT_AUTOLOAD"


def install() -> None:
    """Let MergeKit know this package's methods when it is imported.

    Does nothing when it was called before, or when the environment variable
    ``MERGEKIT_METAGPT_AUTOLOAD`` is 0.
    """
    if os.environ.get(_SWITCH) == "0":
        return
    # By name: an interpreter that reads the start-up file twice may hold two copies.
    if any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds no module; runs a function after each module in ``_HOOKS``."""

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        hook = _HOOKS.get(name)
        if hook is None:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if finder is self or find is None:
                continue
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, hook)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A module's own loader, and a function to call once the module has been executed."""

    def __init__(self, loader: "Any", hook: "Callable[[ModuleType], None]") -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        try:
            self._hook(module)
        except Exception as error:
            _warn(f"{type(error).__name__}: {error}")


def _register(registry: "ModuleType") -> None:
    from mergekit_metagpt.method.merge_method import register

    register()


def _check(merge_methods: "ModuleType") -> None:
    """Notice a MergeKit that keeps its registry elsewhere, so that no hook has run."""
    if "mergekit.merge_methods.registry" not in sys.modules:
        _warn("its method registry is not where this package looks for it")


def _teach_evolve(genome: "ModuleType") -> None:
    from mergekit_metagpt.mergekit_private import METHOD_PARAM_MAPS
    from mergekit_metagpt.method.merge_method import evolvable_parameters

    METHOD_PARAM_MAPS.update(evolvable_parameters())


_HOOKS = {
    "mergekit.merge_methods.registry": _register,
    "mergekit.merge_methods": _check,
    "mergekit.evo.genome": _teach_evolve,
}


def _warn(reason: str) -> None:
    import warnings
    from importlib.metadata import version

    needed = "mergekit>=0.1.5,<0.1.6"
    warnings.warn(
        f"mergekit-metagpt needs {needed} and found {version('mergekit')} ({reason}); its merge "
        f"methods are not available. Run: pip install '{needed}'",
        RuntimeWarning,
        stacklevel=2,
    )
