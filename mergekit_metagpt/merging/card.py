"""The model card of a merge, ready to be published."""

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from mergekit.card import CARD_TEMPLATE, method_md
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_metagpt.merging.record import HUB_NAME
from mergekit_metagpt.names import canonical

PICTURE = "coefficients.png"

_USAGE = """\
### Usage

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "USER/NAME"  # this repository, or a folder with its files
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
```
"""

_COEFFICIENTS = """\
### Scaling coefficients

Chosen by the closed form of [MetaGPT](https://arxiv.org/abs/2406.11385) from the task vectors \
τ = θ - θ_0, at granularity `{granularity}`.

{table}
{picture}
All of them, the norms, and the SHA-256 of every input are recorded in `metagpt.json`. To repeat the merge:

```sh
pip install mergekit-metagpt=={own} mergekit=={mergekit}
{command}
```

### Citation

```bibtex
@inproceedings{{zhou-etal-2024-metagpt,
  title = "{{M}}eta{{GPT}}: Merging Large Language Models Using Model Exclusive Task Arithmetic",
  author = "Zhou, Yuyan and Song, Liang and Wang, Bingning and Chen, Weipeng",
  booktitle = "Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
  year = "2024",
  pages = "1711--1724",
  doi = "10.18653/v1/2024.emnlp-main.102",
}}
```
"""  # noqa: E501


def write_card(directory: Path, name: str, record: dict[str, Any], names: Iterable[str]) -> None:
    """Write MergeKit's model card, with usage, metadata, and the coefficients if there are any.

    MergeKit's own function would ask the hub about each path with one slash. ``names`` are on
    the hub, even if there is such a path.
    """
    known = {name.partition("@")[0] for name in names}
    on_hub: list[str] = []

    def shown(model: ModelReference) -> str:
        """Return the Markdown of a model, and remember which of its paths are on the hub."""
        words = []
        for path in (part.path for part in (model.model, model.lora) if part):
            words.append(_escaped(path))
            if path in known or (HUB_NAME.fullmatch(path) and not os.path.exists(path)):
                on_hub.append(path)
                words[-1] = f"[{words[-1]}](https://huggingface.co/{path})"
        return " + ".join(words)

    config = MergeConfiguration.model_validate(yaml.safe_load(record["config"]))
    # Their order is canonical, so that two runs write the same card.
    models = {model: shown(model) for model in canonical(config.referenced_models())}
    base = None if config.merge_method == "slerp" else config.base_model
    data = ModelCardData(
        base_model=list(dict.fromkeys(on_hub)) or None,  # the hub accepts no empty list
        base_model_relation="merge",
        library_name="transformers",
        tags=["mergekit", "merge", *(["metagpt-merge"] if record["experts"] else [])],
    )
    text = CARD_TEMPLATE.format(
        metadata=data.to_yaml(),
        name=_escaped(name),
        merge_method=method_md(config.merge_method),
        base_text=f" using {models[base]} as a base" if base else "",
        model_list="\n".join(f"* {md}" for model, md in models.items() if model != base),
        config_yaml=record["config"],
    )
    sections = [f"{text.rstrip()}\n"]
    if _is_language_model(directory):
        sections.append(_USAGE)
    if record["experts"]:
        by_name = {str(model): md for model, md in models.items()}
        sections.append(_coefficients(directory, by_name, record))
    ModelCard("\n".join(sections)).save(directory / "README.md")


def _escaped(name: str) -> str:
    """Return a name so that Markdown shows it as it is.

    >>> print(_escaped("a|b_<i>"))
    a\\|b\\_\\<i\\>
    """
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", " ".join(name.split()))


def _is_language_model(directory: Path) -> bool:
    """Return whether the code in the card loads the model and its tokenizer."""
    config = directory / "config.json"
    if not (config.exists() and (directory / "tokenizer_config.json").exists()):
        return False
    architectures = json.loads(config.read_text("utf-8")).get("architectures") or [""]
    return str(architectures[0]).endswith("ForCausalLM")


def _coefficients(directory: Path, shown: dict[str, str], record: dict[str, Any]) -> str:
    """Return the section about the coefficients; ``shown`` is the Markdown of each model."""
    columns = {"norm": "L2 norm of τ", "coefficient": "coefficient"}
    if any(expert["least"] != expert["largest"] for expert in record["experts"]):
        columns |= {"coefficient": "mean coefficient", "least": "least", "largest": "largest"}
    rows = [["expert", *columns.values()], ["---"] * (1 + len(columns))]
    for expert in record["experts"]:
        rows.append([shown[expert["model"]], *(f"{expert[key]:.6g}" for key in columns)])
    picture = f"\n![Coefficients of each expert, by layer]({PICTURE})\n"
    seed = [] if record["seed"] is None else ["--random-seed", str(record["seed"])]
    words = ["mergekit-yaml", "mergekit_config.yml", "merged", *seed, *record["options"]]
    return _COEFFICIENTS.format(
        granularity=" and ".join(record["granularity"]),
        table="\n".join(f"| {' | '.join(row)} |" for row in rows),
        picture=picture if (directory / PICTURE).exists() else "",
        own=record["versions"]["mergekit-metagpt"],
        mergekit=record["versions"]["mergekit"],
        command=shlex.join(words),
    )
