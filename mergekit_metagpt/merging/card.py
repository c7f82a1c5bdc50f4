"""The model card of a merge, ready to be published."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from mergekit.card import CARD_TEMPLATE, method_md
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_metagpt.merging.hub_names import HUB_NAME
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

_CITATION = """\
### Citation

```bibtex
@inproceedings{zhou-etal-2024-metagpt,
  title = "{M}eta{GPT}: Merging Large Language Models Using Model Exclusive Task Arithmetic",
  author = "Zhou, Yuyan and Song, Liang and Wang, Bingning and Chen, Weipeng",
  booktitle = "Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing",
  year = "2024",
  pages = "1711--1724",
  doi = "10.18653/v1/2024.emnlp-main.102",
}
```
"""  # noqa: E501


def write_card(
    path: Path,
    name: str,
    config: MergeConfiguration,
    source: str,
    record: dict[str, Any],
    names: Iterable[str],
) -> None:
    """Write MergeKit's model card, with usage, metadata, and the coefficients if there are any.

    MergeKit's own function would ask the hub about each path with one slash.

    Args:
        path: the card's file, in the directory of the merge.
        name: the title.
        config: what was merged, with the names that the card shows.
        source: its YAML.
        record: the record of the merge.
        names: on the hub, for models that the config had paths of.
    """
    known = {name.partition("@")[0] for name in names}
    models = _Models(config, known)
    tags = ["mergekit", "merge", *(["metagpt-merge"] if record["experts"] else [])]
    data = ModelCardData(
        base_model=models.on_hub or None,  # the hub accepts no empty list
        base_model_relation="merge",
        library_name="transformers",
        tags=tags,
    )
    base = models.base
    text = CARD_TEMPLATE.format(
        metadata=data.to_yaml(),
        name=_escaped(name),
        merge_method=method_md(config.merge_method),
        base_text=f" using {models.md(base)} as a base" if base else "",
        model_list="\n".join(f"* {models.md(it)}" for it in models.all if it != base),
        config_yaml=source,
    )
    sections = [_USAGE] if _is_language_model(path.parent) else []
    if record["experts"]:
        sections += [_coefficients(path.parent, models, record), _CITATION]
    ModelCard("\n".join((f"{text.rstrip()}\n", *sections))).save(path)


class _Models:
    """The models of a config, and how the card shows them.

    Attributes:
        all: in canonical order, so that two runs write the same card.
        base: θ_0, if the method has one.
        on_hub: the names of models and adapters on the hub.
    """

    def __init__(self, config: MergeConfiguration, named: set[str]) -> None:
        self._named = named
        self.all = canonical(config.referenced_models())
        self.base = None if config.merge_method == "slerp" else config.base_model
        found = [path for model in self.all for path in _paths(model) if self._is_on_hub(path)]
        self.on_hub = list(dict.fromkeys(found))

    def md(self, model: ModelReference) -> str:
        """Return the name of a model as Markdown."""
        return " + ".join(
            f"[{_escaped(path)}](https://huggingface.co/{path})"
            if self._is_on_hub(path)
            else _escaped(path)
            for path in _paths(model)
        )

    def _is_on_hub(self, path: str) -> bool:
        """Return whether a path is one of the hub, without asking it."""
        return path in self._named or (bool(HUB_NAME.fullmatch(path)) and not os.path.exists(path))


def _paths(model: ModelReference) -> Iterator[str]:
    for path in (model.model, model.lora):
        if path:
            yield path.path


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


def _coefficients(directory: Path, models: _Models, record: dict[str, Any]) -> str:
    by_name = {str(model): model for model in models.all}
    varies = any(expert["least"] != expert["largest"] for expert in record["experts"])
    columns = ["mean coefficient", "least", "largest"] if varies else ["coefficient"]
    columns = ["expert", "L2 norm of τ", *columns]
    lines = [
        "### Scaling coefficients",
        "",
        f"Chosen by the closed form of [MetaGPT](https://arxiv.org/abs/2406.11385) from the task "
        f"vectors τ = θ - θ_0, at granularity `{' and '.join(record['granularity'])}`.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for expert in record["experts"]:
        keys = ["norm", "coefficient", *(["least", "largest"] if varies else [])]
        cells = [models.md(by_name[expert["model"]]), *(f"{expert[key]:.6g}" for key in keys)]
        lines.append(f"| {' | '.join(cells)} |")
    if (directory / PICTURE).exists():
        lines += ["", f"![Coefficients of each expert, by layer]({PICTURE})"]
    versions = record["versions"]
    seed = [] if record["seed"] is None else ["--random-seed", str(record["seed"])]
    words = ["mergekit-yaml", "mergekit_config.yml", "merged", *seed, *record["options"]]
    lines += [
        "",
        "All of them, the norms, and the SHA-256 of every input are recorded in "
        "`metagpt.json`. To repeat the merge:",
        "",
        "```sh",
        f"pip install mergekit-metagpt=={versions['mergekit-metagpt']} "
        f"mergekit=={versions['mergekit']}",
        shlex.join(words),
        "```",
        "",
    ]
    return "\n".join(lines)
