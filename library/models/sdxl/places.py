"""The places of SDXL's tensors: in an original single file, and in a folder in diffusers layout."""

from collections.abc import Callable

from torch import Tensor, nn

from library.models.filling import Component, Form
from library.models.naming import Part, Place
from library.models.sdxl.components import TEXT_1, TEXT_2, UNET
from library.models.sdxl.folder import SUBFOLDERS
from library.models.sdxl.keymap import FLAT, THIRDS, TRANSPOSED, text_level
from library.models.sdxl.original_tree import is_original_tree

COMPONENTS = {"lora_unet": UNET, "lora_te1": TEXT_1, "lora_te2": TEXT_2}  # by the prefix of the part

VIEWS: dict[Form, Callable[[Tensor], Tensor]] = {  # what the forms read, as views
    FLAT: lambda stored: stored.flatten(1),
    TRANSPOSED: lambda stored: stored.t(),
    **{form: lambda stored, n=n: stored.chunk(3)[n] for n, form in enumerate(THIRDS)},
}


def sdxl_places(part: Part, module: nn.Module) -> dict[str, Place]:
    """The places of all weights and biases of the part's module, be it the library's class or sd-scripts' own U-Net."""
    component = COMPONENTS[part.prefix]
    state = {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[2] in ("weight", "bias")}
    if component is UNET and is_original_tree(module):
        return {name: Place(UNET.prefix + name, _shaped(tensor)) for name, tensor in state.items()}
    sources = component.sources(module)
    return {
        name: Place(
            component.prefix + sources[name].key,
            VIEWS.get(sources[name].form) or _shaped(tensor),
            tuple(_other_places(component, module, name)),
        )
        for name, tensor in state.items()
    }


def _other_places(component: Component, module: nn.Module, name: str) -> list[Place]:
    folder = SUBFOLDERS[component]
    if component is UNET:
        return [Place(f"{folder}/{name}")]
    bare = name.removeprefix(text_level(module))
    places = [Place(f"{folder}/text_model.{bare}"), Place(f"{folder}/{bare}")]
    if bare == "text_projection.weight":
        places.append(Place(component.prefix + bare))  # ComfyUI writes the matrix of a Linear
    return places


def _shaped(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """A view in the shape of `tensor`, where only the writing of a 1x1 kernel differs."""
    shape = tuple(tensor.shape)

    def view(stored: Tensor) -> Tensor:
        sides = tuple(stored.shape)
        return stored.view(shape) if (1, 1) in (sides[2:], shape[2:]) and sides[:2] == shape[:2] else stored

    return view
