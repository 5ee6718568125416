"""The places of Anima's tensors: in original single files, whose keys are paths below one of a few prefixes, and in diffusers folders."""

from torch import nn

from library.models.anima.components import DIT_PREFIXES, ENCODER_PREFIXES
from library.models.anima.names import NAMING
from library.models.naming import Part, Place, Target


def anima_places(part: Part, module: nn.Module) -> dict[str, Place]:
    """The places of all weights and biases of the denoiser, in any of its class trees, or of the text encoder."""
    state = module.state_dict()
    return {
        f"{target.module_path}.{leaf}": _place(part, target, leaf)
        for target in (*NAMING.targets(part, module), *NAMING.outside(part, module))
        for leaf in ("weight", "bias")
        if f"{target.module_path}.{leaf}" in state
    }


def _place(part: Part, target: Target, leaf: str) -> Place:
    component, _, path = target.diffusers_path.partition(".")
    prefixes = DIT_PREFIXES if part.is_denoiser else ENCODER_PREFIXES
    keys = [f"{prefix}{target.path}.{leaf}" for prefix in prefixes]
    in_folder = [f"{component}/{level}{path}.{leaf}" for level in ("", "model.")]  # the latter in a causal language model's
    first, *others = (Place(key) for key in (*keys, *in_folder))
    return Place(first.key, others=tuple(others))
