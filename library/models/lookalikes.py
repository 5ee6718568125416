"""What a tensor file seems to be, told from its keys, for the error of a loader that it does not fit.

Each family lists its own kinds of files in `<family>/lookalikes.py`, as `FILES`; the kinds of no family here stand below.
"""

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Lookalike:
    """A kind of file: a pattern that one of its keys has, what it is, and what its family's users should do with it."""

    pattern: str
    what: str
    advice: str = ""


# The first that fits is said. These have marks of their own, which no family's file has:
SPECIAL = (
    Lookalike(
        r"lora_(down|up|A|B)\b|hada_w1_a|lokr_w[12]|oft_(blocks|diag)|\.diff_b?$",
        "an adapter",
        "give adapters to --network_weights, --base_weights or --lora_weight",
    ),
    Lookalike(r"joint_blocks\.|double_blocks\.|double_stream|context_refiner\.", "a Stable Diffusion 3, Flux or similar transformer"),
    Lookalike(r"^cond_stage_model\.transformer\.", "a Stable Diffusion 1.x checkpoint"),
    Lookalike(r"^cond_stage_model\.model\.", "a Stable Diffusion 2.x checkpoint"),
    Lookalike(r"(^|\.)blocks\.\d+\.(self|cross)_attn\.[qkvo]\.", "a Wan transformer"),
    Lookalike(r"(^|\.)transformer_blocks\.\d+\.(img|txt)_mod\.", "a Qwen-Image transformer"),
    Lookalike(r"(^|\.)(encoder|decoder)\.(down|up)samples\.\d+\.(down|up)samples\.", "a Wan 2.2 VAE"),
    Lookalike(r"(^|\.)(encoder|decoder)\.block\.\d+\.layer\.\d+\.", "a T5 model"),
    Lookalike(r"(^|\.)visual\.", "a vision and language model"),
)
# These have marks that the files of some families have too:
GENERAL = (
    Lookalike(r"^(model\.)?layers\.\d+\.self_attn", "a language model"),
    Lookalike(r"text_model\.encoder\.layers|resblocks\.", "a CLIP text encoder"),
)


def seems_to_be(keys: Iterable[str], family: str, otherwise: str, asked: Lookalike | None = None) -> str | None:
    """Half a sentence for an error of `family`: which kind of file has these keys, and what to do; None for `asked` and the unknown.

    `otherwise` says what to do about a file of no use to the family.
    """
    keys = list(keys)
    found = next(((kind, advice) for kind, advice in _kinds(family, otherwise) if any(map(re.compile(kind.pattern).search, keys))), None)
    if found is None or found[0] is asked:
        return None
    kind, advice = found
    return f"it seems to be {kind.what}" + (f"; {advice}" if advice else "")


def _kinds(family: str, otherwise: str) -> Iterator[tuple[Lookalike, str]]:
    """Every kind with the advice that it gets from this family, in the order of trying."""
    yield from ((kind, kind.advice or otherwise) for kind in SPECIAL)
    yield from ((kind, kind.advice) for kind in _files(family))
    for other in _families():
        if other != family:
            yield from ((kind, f"that is a file for {other}_train_network.py") for kind in _files(other))
    yield from ((kind, otherwise) for kind in GENERAL)


def _families() -> list[str]:
    import library.models

    folders = sorted(module.name for module in pkgutil.iter_modules(library.models.__path__) if module.ispkg)
    return [name for name in folders if importlib.util.find_spec(f"library.models.{name}.lookalikes") is not None]


def _files(family: str) -> tuple[Lookalike, ...]:
    return importlib.import_module(f"library.models.{family}.lookalikes").FILES
