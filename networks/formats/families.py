"""For which family of models a file seems to be, told by the names of its layers."""

import re
from collections.abc import Iterable
from itertools import islice

from library.models.naming import Naming, naming_named, naming_names

ENOUGH = 2000  # names that tell
FOREIGN = (  # what only the names of other families have -> the family
    (r"(double|single)_blocks_\d+_", "FLUX"),
    (r"single_transformer_blocks_\d+_", "FLUX"),
    (r"lora_te_text_model_|down_blocks_0_attentions_|up_blocks_3_|input_blocks_[12]_1_", "Stable Diffusion 1 or 2"),
    (r"blocks_\d+_(self|cross)_attn_[qkvo](_lora|$)|blocks_\d+_ffn_", "Wan"),
)


def seems_for(names: Iterable[str]) -> str | None:
    """The title of the family whose layers are named like this, known or foreign; None where nothing tells."""
    names = [underscored(name) for name in islice(names, ENOUGH)]
    foreign = next((title for mark, title in FOREIGN if any(re.search(mark, name) for name in names)), None)
    known = family_of(names)
    return foreign or (None if known is None else known.title)


def family_of(names: Iterable[str]) -> Naming | None:
    """The known family that most of the names are of, or None."""
    names = [underscored(name) for name in islice(names, ENOUGH)]
    families = [naming_named(name) for name in naming_names()]
    votes = [sum(any(re.search(mark, name) for mark in family.marks) for name in names) for family in families]
    return families[votes.index(max(votes))] if any(votes) else None


def underscored(name: str) -> str:
    """A name as kohya's files have it: dots are underscores."""
    return name.replace(".", "_")
