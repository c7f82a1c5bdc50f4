"""What a tensor does in its model: which of its axes meets the inputs, by name and shape alone.

A merge sees a model with its config, as bare weight files, or as tensors in memory. Names and
shapes are there each time. Where they leave a choice, the shapes of tensors beside it decide.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

# Returns the shape of another tensor of the model by its full name, or None if there is none.
ShapeOf = Callable[[str], Sequence[int] | None]


class Role(Enum):
    """What a tensor does. A matrix of more than two axes is a stack: the last two are a matrix."""

    LINEAR = "a matrix, outputs × inputs: its columns are the inputs"
    TRANSPOSED = "a matrix, inputs × outputs: its rows are the inputs"
    ROWS = "a table: each row is looked up by itself"
    ELEMENTS = "no matrix: each element is used by itself"


def role_of(name: str | None, shape: Sequence[int], shape_of: ShapeOf) -> Role:
    """Return what a tensor does in its model.

    Args:
        name: its name in weight files or in memory, with any prefix; None if it is unknown.
        shape: its shape.
        shape_of: returns the shape of another tensor. It is called only for names that leave a
            choice, since it may have to read a file.

    >>> role_of("model.embed_tokens.weight", (1000, 64), {"lm_head.weight": (1000, 64)}.get).name
    'ROWS'
    >>> role_of("model.embed_tokens.weight", (1000, 64), {}.get).name  # tied to the head
    'LINEAR'
    >>> role_of("model.layers.0.self_attn.q_proj.weight", (32, 64), {}.get).name
    'LINEAR'
    >>> role_of("backbone.layers.0.mixer.conv1d.weight", (128, 1, 4), {}.get).name
    'ELEMENTS'

    A square matrix of GPT-2 is inputs × outputs, as the matrix beside it shows:

    >>> gpt2 = {"h.0.attn.c_attn.weight": (64, 192), "h.0.attn.c_attn.bias": (192,)}
    >>> role_of("h.0.attn.c_proj.weight", (64, 64), gpt2.get).name
    'TRANSPOSED'
    >>> bigcode = {"h.0.attn.c_attn.weight": (80, 64), "h.0.attn.c_attn.bias": (80,)}
    >>> role_of("h.0.attn.c_proj.weight", (64, 64), bigcode.get).name
    'LINEAR'
    """
    if len(shape) < 2:
        return Role.ELEMENTS

    def known(other: str) -> Sequence[int] | None:
        return shape if other == name else shape_of(other)

    for found, matrix, stack in _rules_of(name):
        rule = matrix if len(shape) == 2 else stack
        return rule if isinstance(rule, Role) else rule(found[1], found[2], known)
    # [1, 1, d] is a vector with axes to broadcast it, such as RWKV's time mix.
    return Role.ELEMENTS if len(shape) > 2 and 1 in shape[-2:] else Role.LINEAR


def is_table(name: str | None) -> bool:
    """Return whether a tensor of this name is a table, which may be tied to the head."""
    first = next((matrix for _, matrix, _ in _rules_of(name)), None)
    return first in (Role.ROWS, _of_tokens)


def is_head(name: str | None) -> bool:
    """Return whether a tensor of this name is a head, which may be a table."""
    return (name or "").removesuffix(".weight").rpartition(".")[2] in _HEADS


def _rules_of(name: str | None) -> "Iterator[tuple[re.Match[str], _Rule, _Rule]]":
    """Yield the rules that fit a name; the first one decides."""
    for parts, matrix, stack in _RULES:
        if found := re.fullmatch(rf"((?:.*\.)?)({parts})", name or ""):
            yield found, matrix, stack


def _of_tokens(model: str, table: str, shape_of: ShapeOf) -> Role:
    """Tell a table of tokens from one that is the head too, a matrix: then no head is stored.

    The head is beside the table, or beside one of the modules that it is in.
    """
    parts = model.split(".")
    outer = (".".join([*parts[:depth], ""]) for depth in range(len(parts)))
    heads = (f"{module}{head}.weight" for module in outer for head in _HEADS)
    return Role.ROWS if any(map(shape_of, heads)) else Role.LINEAR


def _in_block(block: str, layer: str, shape_of: ShapeOf) -> Role:
    """Tell a layer of GPT-2, inputs × outputs, by its bias, which has an entry per output.

    The layers of a block are alike. If this one is square, another one shows what they are.
    """
    for weight in (layer, "attn.c_attn.weight", "mlp.c_fc.weight"):
        sizes = shape_of(block + weight)
        if sizes and sizes[0] != sizes[1]:
            bias = shape_of(block + weight.removesuffix("weight") + "bias")
            return Role.TRANSPOSED if bias and bias[0] == sizes[1] else Role.LINEAR
    return Role.LINEAR


def _of_experts(experts: str, part: str, shape_of: ShapeOf) -> Role:
    """Tell how a stack of experts lies: the first has two outputs for each input of the second.

    They are [2f, d] and [d, f], or [d, 2f] and [f, d] with the inputs first. Nothing is both.
    """
    pair = ("fc1.weight", "fc2.weight") if "fc" in part else ("gate_up_proj", "down_proj")
    first, second = (shape_of(experts + half) for half in pair)
    if first and second and tuple(first[-2:]) == (second[-1], 2 * second[-2]):
        return Role.TRANSPOSED
    return Role.LINEAR


_Rule = Role | Callable[[str, str, ShapeOf], Role]
_HEADS = ("lm_head", "output", "output_layer", "embed_out", "head", "score", "classifier")
_TABLE = r"(\w+_)?emb(ed(ding)?s?)?|embed_(in|positions|(\w+_)?tokens(_per_layer)?)"

# The last parts of a name; its role with two axes; its role with more. The first row that fits
# decides. What fits none is a linear layer, as most are: lm_head.weight, experts.0.w1.weight.
_RULES: tuple[tuple[str, _Rule, _Rule], ...] = (
    # A convolution is [outputs, inputs, window]. With two axes, a linear layer took its place.
    (r"\w*conv\w*(\.\w+)?\.weight", Role.LINEAR, Role.ELEMENTS),
    (r"\w*patch_embed\w*(\.proj\w*)?\.weight", Role.LINEAR, Role.ELEMENTS),
    # ProphetNet projects onto them.
    (r"relative_pos_embeddings\.weight", Role.LINEAR, Role.LINEAR),
    # An encoder may have no head at all, so what looks like BERT's or T5's is a table.
    (
        r"(embed_tokens|embed_in|input_embedding|wte|tok_embeddings|tokens_embed|embeddings|"
        r"(?<!embeddings\.)word_embeddings)\.weight",
        _of_tokens,
        Role.ELEMENTS,
    ),
    # A table of more than two axes is added as a whole, such as [1, positions, d].
    (rf"({_TABLE})(\.(weights?|(shard_)?\d+))*", Role.ROWS, Role.ELEMENTS),
    (r"(wpe|w|shared|bias_values)\.weight", Role.ROWS, Role.ELEMENTS),
    (r"relative_attention_bias(\.weight)?", Role.ROWS, Role.ELEMENTS),
    (r"(\w+_)?(bias|ape)|A_log|D|scale|static_w(eight)?", Role.ELEMENTS, Role.ELEMENTS),
    (r"(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc2?|c_proj)\.weight", _in_block, Role.LINEAR),
    (r"gate_up_proj|down_proj|fc[12]\.weight", Role.LINEAR, _of_experts),
    # Multiplied as inputs @ weight in RecurrentGemma, Inkling, Gemma 3 and DBRX.
    (r"rg_lru\.\w+_weight|rel_logits_proj\.proj", Role.TRANSPOSED, Role.TRANSPOSED),
    (r"mm_input_projection_weight|experts\.mlp\.w2", Role.TRANSPOSED, Role.TRANSPOSED),
)
