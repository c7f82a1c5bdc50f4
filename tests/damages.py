"""Ways to damage a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import edit

NORM = "model.norm.weight"


def rewrite(model: str, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (with None) remove tensors of an unsharded checkpoint."""

    def change(held: dict[str, Any]) -> None:
        held.update(tensors)
        for name in [name for name, tensor in tensors.items() if tensor is None]:
            del held[name]

    edit(model, change)


def both(*damages: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: [damage(*given) for damage in damages]


def configure(model: str, **changes: Any) -> None:
    """Change settings in the config.json of a checkpoint; None removes one."""
    file = Path(model, "config.json")
    settings = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: it for key, it in settings.items() if it is not None}))


def reshard(model: str) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    Path(model, "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="20KB")


def cut(model: str) -> None:
    file = Path(model, "model.safetensors")
    file.write_bytes(file.read_bytes()[:-10])


def overwrite(name: str, content: bytes) -> Callable[[str], Any]:
    return lambda model: Path(model, name).write_bytes(content)


def remove(name: str) -> Callable[[str], None]:
    return lambda model: Path(model, name).unlink()


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[str], None]:
    def edit(model: str) -> None:
        reshard(model)
        file = Path(model, "model.safetensors.index.json")
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return edit


def move_norm(weight_map: dict[str, str]) -> None:
    weight_map[NORM] = next(file for file in weight_map.values() if file != weight_map[NORM])
