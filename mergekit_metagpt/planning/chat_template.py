"""The chat template that a merge gets if its config leaves the choice to MergeKit."""

import logging
from collections import Counter
from dataclasses import dataclass

import transformers
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_metagpt.planning.config import parts
from mergekit_metagpt.wording import BadInputError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tie:
    """Several templates that the models of a merge have equally often.

    Attributes:
        template: the first of them, in the order of the config.
        model: the model that has it.
        count: how many there are.
    """

    template: str
    model: ModelReference
    count: int

    def __str__(self) -> str:
        return (
            f"chat_template: auto takes the most frequent template, but {self.count} are equally "
            f"frequent; this package takes that of {self.model}, and mergekit-yaml any of them by "
            "chance. To choose, set chat_template to one of MergeKit's names, or to a template."
        )


def most_frequent(config: MergeConfiguration) -> Tie | None:
    """Return the first of the most frequent templates, if MergeKit would choose one by chance.

    MergeKit asks the models in the order of a set. The order here is that of the config, the base
    first.

    Raises:
        BadInputError: if MergeKit would not accept that template as text.
    """
    if config.chat_template != "auto":
        return None
    listed = [config.base_model, *(model for part in parts(config) for model in part.models)]
    models = [model for model in dict.fromkeys(listed) if model is not None]
    found = [(template, model) for model in models if (template := _template(model))]
    counts = Counter(template for template, _ in found)
    most = max(counts.values(), default=0)
    first = [(template, model) for template, model in found if counts[template] == most]
    count = sum(number == most for number in counts.values())
    if count < 2:
        return None
    template, model = first[0]
    if len(template) < 20 or "{" not in template:  # MergeKit takes this for a name
        raise BadInputError(
            f"chat_template: auto would take that of {model}, {template!r}, since {count} are "
            "equally frequent, but that is no template; name one, such as chat_template: chatml."
        )
    return Tie(template, model, count)


def with_chosen_template(config: MergeConfiguration) -> MergeConfiguration:
    """Return a config of which MergeKit chooses no chat template by chance; warn of a choice."""
    tie = most_frequent(config)
    if tie is None:
        return config
    LOG.warning("%s", tie)
    return config.model_copy(update={"chat_template": tie.template})


def _template(model: ModelReference) -> str | None:
    """Return a model's chat template as MergeKit finds it."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.model.path, revision=model.model.revision
        )
    except Exception as error:  # tokenizers raise many kinds of errors; MergeKit goes on, too
        LOG.info("No tokenizer could be loaded for %s: %s", model, error)
        return None
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template.strip() if template else None
