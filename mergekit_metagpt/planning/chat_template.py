"""The chat template that a merge gets if its config leaves the choice to MergeKit."""

import logging
from collections import Counter
from typing import NamedTuple

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_metagpt.measure.vocabularies import load_tokenizer
from mergekit_metagpt.planning.config import parts
from mergekit_metagpt.wording import BadInputError

LOG = logging.getLogger(__name__)


class Tie(NamedTuple):
    """The first of several templates that models have equally often, and what to say of it."""

    template: str
    note: str


def most_frequent(config: MergeConfiguration) -> Tie | None:
    """Return the first of the most frequent templates, if MergeKit would choose one by chance.

    MergeKit asks the models in the order of a set. The order here is that of the config, the base
    first.
    """
    if config.chat_template != "auto":
        return None
    base = [config.base_model] if config.base_model else []
    models = dict.fromkeys([*base, *(model for part in parts(config) for model in part.models)])
    found = {model: template for model in models if (template := _template(model))}
    counts = Counter(found.values())
    tied = [model for model in found if counts[found[model]] == max(counts.values())]
    different = len({found[model] for model in tied})
    # MergeKit would take any other for a name.
    model = next((it for it in tied if len(found[it]) >= 20 and "{" in found[it]), None)
    if different < 2 or model is None:
        return None
    return Tie(
        found[model],
        f"chat_template: auto takes the most frequent template, but {different} are equally "
        f"frequent; this package takes that of {model}, and mergekit-yaml any of them by "
        "chance. To choose, set chat_template to one of MergeKit's names, or to a template.",
    )


def with_chosen_template(config: MergeConfiguration) -> MergeConfiguration:
    """Return a config of which MergeKit chooses no chat template by chance; warn of a choice."""
    if tie := most_frequent(config):
        LOG.warning("%s", tie.note)
        return config.model_copy(update={"chat_template": tie.template})
    return config


def _template(model: ModelReference) -> str | None:
    """Return a model's chat template as MergeKit finds it."""
    try:
        tokenizer = load_tokenizer(model, None, trust_remote_code=False)
    except BadInputError as error:  # MergeKit goes on, too
        LOG.info("%s", error)
        return None
    template = tokenizer and tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if template else None
