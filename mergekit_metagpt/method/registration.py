"""Registration: every task-vector method X of MergeKit gets a counterpart."""

from importlib import import_module
from typing import Any

# A submodule only: at registration the package `mergekit.merge_methods` is half imported.
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge

from mergekit_metagpt.method.merge_method import MetaGPTMerge


def _task_vector_methods() -> list[GeneralizedTaskArithmeticMerge]:
    methods = _registry().registered_methods()
    return [method for method in methods if isinstance(method, GeneralizedTaskArithmeticMerge)]


def _registry() -> Any:
    """Return MergeKit's registry: at each call, since it may be reloaded or imported anew."""
    return import_module("mergekit.merge_methods.registry")


def register() -> None:
    """Register ``metagpt`` and every ``metagpt_X`` with MergeKit. A second call changes nothing.

    The start-up file of this package calls this when MergeKit is imported. Call it yourself
    only where Python does not read start-up files: ``pip install --target``, ``python -S``.
    """
    registry = _registry()
    known = {method.spec.name for method in registry.registered_methods()}
    for stock in _task_vector_methods():
        method = MetaGPTMerge(stock)
        if method.spec.name not in known:
            registry.register(method)


def evolvable_parameters() -> dict[str, list[str]]:
    """Return, by method, the per-expert parameters that ``mergekit-evolve`` may search."""
    methods = [MetaGPTMerge(stock) for stock in _task_vector_methods()]
    return {m.spec.name: ["weight"] if m.is_plain else ["weight", "density"] for m in methods}
