"""Tiny models of Llama's architecture, written in place; and what a merge of them has to be."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import reference
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import save

SHAPES = {
    "model.embed_tokens.weight": (16, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (8, 8),
    "model.layers.0.self_attn.v_proj.weight": (8, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.post_attention_layernorm.weight": (8,),
    "model.layers.0.mlp.gate_proj.weight": (12, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
NORMS = [name for name, shape in SHAPES.items() if len(shape) == 1]
ADAPTED = "model.layers.0.self_attn.q_proj"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16,
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "tie_word_embeddings": False,
    "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1,
           "target_modules": ["q_proj"], "bias": "none"}  # fmt: skip

FULL = ("a", "b", "c d")  # a name with a space, too
EXPERTS = (*FULL, "lora")
SEED = 7
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setup:
    """What to merge, and how."""

    experts: tuple[str, str]
    granularity: str
    exponent: int
    method: str = "metagpt"

    @property
    def parameters(self) -> dict[str, Any]:
        density = {} if self.method == "metagpt" else {"density": 0.5}
        return {"granularity": self.granularity, "exponent": self.exponent, **density}


class Models:
    """The base, three experts and an adapter: the files, and what they should hold."""

    known: ClassVar[dict[Any, "Expected"]] = {}

    def __init__(self, root: Path) -> None:
        self.root, self.clock = root, 10**18
        self.stored: dict[str, Weights] = {}
        generator = torch.Generator().manual_seed(SEED)
        self.base = {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}
        self.put("base", self.base)
        for seed, name in enumerate(EXPERTS):
            self.train(name, seed)

    def path(self, name: str) -> str:
        return f"{self.root}/base+{self.root}/lora" if name == "lora" else f"{self.root}/{name}"

    def train(self, name: str, seed: int, replace: bool = False) -> None:
        """Give an expert the numbers of a seed."""
        generator, scale = torch.Generator().manual_seed(seed), 0.01 * (1 + seed)
        noise = {n: scale * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        if name == "lora":
            sides = {"A": 10 * noise[NORMS[0]][None], "B": 10 * noise[NORMS[1]][:, None]}
            prefix = f"base_model.model.{ADAPTED}.lora"
            self.put(name, {f"{prefix}_{n}.weight": side for n, side in sides.items()}, replace)
        else:
            self.put(name, {n: self.base[n] + noise[n] for n in SHAPES}, replace)

    def put(self, name: str, weights: Weights, replace: bool = False) -> None:
        """Write weights over the file that is there, or replace it; each at a time of its own."""
        self.stored[name] = weights
        kind, config = ("adapter_", ADAPTER) if name == "lora" else ("", CONFIG)
        file = self.root / name / f"{kind}model.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True)
            (file.parent / f"{kind}config.json").write_text(json.dumps(config))
        written = file.with_suffix(".new") if replace else file
        with written.open("r+b" if written.exists() else "wb") as stream:
            stream.write(save(weights, metadata={"format": "pt"}))
            stream.truncate()
        self.clock += 1
        os.utime(written, ns=(self.clock, self.clock))
        os.replace(written, file)

    def weights(self, setup: Setup) -> list[Weights]:
        """Return the weights of both experts, with the adapter applied."""
        adapted, (a, b) = f"{ADAPTED}.weight", self.stored["lora"].values()
        lora = {**self.base, adapted: self.base[adapted] + b @ a}
        return [lora if name == "lora" else self.stored[name] for name in setup.experts]

    def files(self, setup: Setup) -> tuple[tuple[int, int], ...]:
        """Return what tells the files of both experts from others, of the same content too."""
        names = [f"{name}/{'adapter_' * (name == 'lora')}model" for name in setup.experts]
        stats = [os.stat(self.root / f"{name}.safetensors") for name in names]
        return tuple((stat.st_ino, stat.st_mtime_ns) for stat in stats)

    def contents(self, setup: Setup) -> tuple[bytes, ...]:
        return tuple(b"".join(w.numpy().tobytes() for w in e.values()) for e in self.weights(setup))

    def expected(self, setup: Setup) -> "Expected":
        """Return what a merge has to be; all bases are equal, so it follows from the contents."""
        key = setup, self.contents(setup)
        if key not in self.known:
            self.known[key] = self._expected(setup)
        return self.known[key]

    def _expected(self, setup: Setup) -> "Expected":
        base, experts = self.base, self.weights(setup)
        norms = reference.squared_norms(base, experts)
        rows = reference.coefficients(base, experts, setup.granularity, exponent=setup.exponent)
        if setup.granularity != "direction" and setup.method == "metagpt":
            return Expected(norms, rows, reference.merged(base, experts, rows))
        states = dict(zip(map(self.path, setup.experts), experts, strict=True))
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            merged = merge_state_dicts(
                {"base": base, **states}, setup.method, base="base", parameters=setup.parameters
            )
        found = {name: reference.as_float64(tensor) for name, tensor in merged.items()}
        if setup.granularity == "direction":  # how much of each task vector is in the merge
            for name, row in rows.items():
                origin = reference.as_float64(base[name])
                taus = [reference.as_float64(expert[name]) - origin for expert in experts]
                inside = [(tau * (found[name] - origin)).sum() for tau in taus]
                row[:] = inside / np.maximum(norms[name], 1e-300)
        return Expected(norms, rows, found)

    def are_finite(self, setup: Setup) -> bool:
        return all(w.isfinite().all() for e in self.weights(setup) for w in e.values())

    def unambiguous(self, setup: Setup) -> Setup:
        """Return a setup that leaves no matter of taste.

        That is whether exponent 0 gives an expert a share of what it alone has not moved.
        """
        norms = reference.squared_norms(self.base, self.weights(setup))
        still = np.array(list(norms.values())) == 0
        in_part = (still.any(0) & ~still.all(0)).any()
        by_scope = setup.granularity in ("tensor", "layer")
        return replace(setup, exponent=2) if by_scope and in_part else setup

    def config(self, setup: Setup) -> dict[str, Any]:
        return {
            "merge_method": setup.method,
            "base_model": self.path("base"),
            "models": [{"model": self.path(name)} for name in setup.experts],
            "parameters": setup.parameters,
        }


class Expected(NamedTuple):
    """What a merge has to be, by the formula: T squared norms and T coefficients by tensor."""

    norms: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    merged: dict[str, np.ndarray]
