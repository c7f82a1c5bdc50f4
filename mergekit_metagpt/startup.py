"""How stock MergeKit finds the methods of this package.

MergeKit 0.1.5 has no plugin entry point. A start-up file beside this package (read by
``site`` when an interpreter starts) imports the package, which calls :func:`install`. That puts
a finder on ``sys.meta_path``. The finder does nothing until MergeKit is imported, and then lets the
package register itself as soon as MergeKit's method registry has been executed.

This module runs in *every* interpreter of the environment: it imports nothing that the
interpreter has not imported already, and raises nothing.
"""

import _thread
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from mergekit_metagpt.method.merge_method import MetaGPTMerge

_REGISTRY = "mergekit.merge_methods.registry"


def install() -> None:
    """Register this package's methods with MergeKit as soon as MergeKit is imported.

    Does nothing if it was called before, or if the environment variable
    ``MERGEKIT_METAGPT_AUTOLOAD`` is 0.
    """
    if os.environ.get("MERGEKIT_METAGPT_AUTOLOAD") == "0":
        return
    # Compare names: if the start-up file is read twice, this class may exist twice.
    if any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    registry = sys.modules.get(_REGISTRY)
    if registry is not None and not getattr(registry.__spec__, "_initializing", False):
        _run(_register, registry)  # MergeKit came before this package


def register() -> None:
    """Register ``metagpt`` and every ``metagpt_X`` with MergeKit. A second call changes nothing.

    The start-up file of this package calls this when MergeKit is imported. Call it yourself
    only where Python does not read start-up files: ``pip install --target``, ``python -S``.
    """
    # Here and below at each call, since MergeKit may be reloaded or imported anew.
    from mergekit.merge_methods import registry

    known = {method.spec.name for method in registry.registered_methods()}
    for method in _methods():
        if method.spec.name not in known:
            registry.register(method)


def _methods() -> "list[MetaGPTMerge]":
    """Return a counterpart for every task-vector method of MergeKit."""
    # Submodules only: at registration the package `mergekit.merge_methods` is half imported.
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

    from mergekit_metagpt.measure.provider import PROVIDER
    from mergekit_metagpt.method.merge_method import MetaGPTMerge

    stock = registry.registered_methods()
    own = [method for method in stock if isinstance(method, GeneralizedTaskArithmeticMerge)]
    return [MetaGPTMerge(method, PROVIDER) for method in own]


class _Finder:
    """Runs a function when a module in ``_HOOKS`` has been executed; other finders find it."""

    def __init__(self) -> None:
        self._searches: set[tuple[int, str]] = set()
        self._leads = False

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if not self._leads and "mergekit" in sys.modules:
            # Go first, once: another finder, such as a type checker's, may have come in front, and
            # would find MergeKit's modules without this one.
            self._leads = True
            sys.meta_path[:] = [self, *(it for it in sys.meta_path if it is not self)]
        hook = _HOOKS.get(name)
        search = (_thread.get_ident(), name)
        if hook is None or search in self._searches:  # another finder calls this one
            return None
        self._searches.add(search)
        try:
            others = (
                it for it in list(sys.meta_path) if it is not self and hasattr(it, "find_spec")
            )
            specs = (other.find_spec(name, path, target) for other in others)
            spec = next(filter(None, specs), None)
        finally:
            self._searches.discard(search)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, hook)  # type: ignore[assignment]
        return spec


class _Loader:
    """A module's own loader, and a function to call once the module has been executed."""

    def __init__(self, loader: "Any", hook: "Callable[[ModuleType], None]") -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> "Any":
        if name == "_loader":  # not set yet on a copy; would recurse for ever
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _run(self._hook, module)


def _run(hook: "Callable[[ModuleType], None]", module: "ModuleType") -> None:
    try:
        hook(module)
    except Exception as error:
        _warn(f"{type(error).__name__}: {error}")


def _register(registry: "ModuleType") -> None:
    method = sys.modules.get("mergekit_metagpt.method.merge_method")
    name = "GeneralizedTaskArithmeticMerge"
    if method is not None and getattr(method, name) is not getattr(registry, name):
        # MergeKit was imported again: remove our modules, whose classes derive from the old one.
        for name in [n for n in sys.modules if n.startswith("mergekit_metagpt.")]:
            if name != __name__:
                del sys.modules[name]
    register()
    if not any(method.spec.name == "metagpt" for method in registry.registered_methods()):
        raise RuntimeError("it has no task arithmetic")


def _check(merge_methods: "ModuleType") -> None:
    """Warn if MergeKit keeps its registry elsewhere, so that ``_register`` has not run."""
    if _REGISTRY not in sys.modules:
        _warn("its method registry is not where this package looks for it")


def _teach_evolve(genome: "ModuleType") -> None:
    from mergekit_metagpt.mergekit_private import METHOD_PARAM_MAPS

    for method in _methods():
        METHOD_PARAM_MAPS[method.spec.name] = ["weight"] + ["density"] * (not method.is_plain)


_HOOKS = {
    _REGISTRY: _register,
    "mergekit.merge_methods": _check,
    "mergekit.evo.genome": _teach_evolve,
}


def _warn(reason: str) -> None:
    import warnings
    from importlib.metadata import version

    needed = "mergekit>=0.1.5,<0.1.6"
    try:
        found = version("mergekit")
    except Exception:  # its metadata may be missing or damaged
        found = "an unknown version"
    warnings.warn(
        f"mergekit-metagpt needs {needed} and found {found} ({reason}); its merge "
        f"methods are not available. Run: pip install '{needed}'",
        RuntimeWarning,
        stacklevel=2,
    )
