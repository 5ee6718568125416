"""The places of Anima's tensors: in original single files, whose keys are paths below one of a few prefixes, and in diffusers folders."""

from torch import nn

from library.models.anima.names import NAMING
from library.models.anima.outline import PREFIXES
from library.models.naming import Part, Place, Target


def anima_places(part: Part, module: nn.Module) -> dict[str, Place]:
    """The places of all weights and biases of the denoiser, in any of its class trees, or of the text encoder."""
    state = module.state_dict()
    return {
        f"{target.module_path}.{leaf}": _place(target, leaf)
        for target in (*NAMING.targets(part, module), *NAMING.outside(part, module))
        for leaf in ("weight", "bias")
        if f"{target.module_path}.{leaf}" in state
    }


def _place(target: Target, leaf: str) -> Place:
    component, _, path = target.diffusers_path.partition(".")
    keys = [f"{prefix}{target.path}.{leaf}" for prefix in PREFIXES]
    in_folder = [f"{component}/{level}{path}.{leaf}" for level in ("", "model.")]  # the latter in a causal language model's
    first, *others = (Place(key) for key in (*keys, *in_folder))
    return Place(first.key, others=tuple(others))
