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
    listed = [config.base_model, *(model for part in parts(config) for model in part.models)]
    models = [model for model in dict.fromkeys(listed) if model is not None]
    found = {model: template for model in models if (template := _template(model))}
    counts = Counter(found.values())
    tied = [template for template in counts if counts[template] == max(counts.values())]
    # MergeKit would take any other for a name.
    template = next((text for text in tied if len(text) >= 20 and "{" in text), None)
    if len(tied) < 2 or template is None:
        return None
    model = next(model for model in found if found[model] == template)
    return Tie(
        template,
        f"chat_template: auto takes the most frequent template, but {len(tied)} are equally "
        f"frequent; this package takes that of {model}, and mergekit-yaml any of them by "
        "chance. To choose, set chat_template to one of MergeKit's names, or to a template.",
    )


def with_chosen_template(config: MergeConfiguration) -> MergeConfiguration:
    """Return a config of which MergeKit chooses no chat template by chance; warn of a choice."""
    tie = most_frequent(config)
    if tie is None:
        return config
    LOG.warning("%s", tie.note)
    return config.model_copy(update={"chat_template": tie.template})


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
