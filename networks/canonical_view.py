"""A model as the original checkpoint names it: what third-party network modules walk instead of the library's class tree.

Network modules such as `lycoris.kohya` find layers by the class names of containers (Transformer2DModel, ResnetBlock2D, ...) and name
adapters after the paths of what they find. Both differ between sd-scripts' classes and a library's. The view has the same layer
objects under the family's canonical paths, in containers of the documented class names, so that such a module adapts the layers
and writes the names that it does inside sd-scripts.
"""

from torch import nn

from library.models.naming import Naming, Part


class Container(nn.Module):
    """A named place in a view; it computes nothing."""


def canonical_view(naming: Naming, part: Part, model: nn.Module) -> nn.Module:
    """The adaptable layers of `model` under their canonical paths. Layers are shared, not copied: patching one patches the model."""
    view = Container()
    for target in naming.targets(part, model):
        above, _, last = target.path.rpartition(".")
        place: nn.Module = view
        path = ""
        for name in above.split(".") if above else ():
            path = f"{path}.{name}".lstrip(".")
            if name not in place._modules:
                place.add_module(name, _container(target.group if path == target.container else ""))
            place = place.get_submodule(name)
        place.add_module(last, model.get_submodule(target.module_path))
    return view


def _container(group: str) -> nn.Module:
    """An empty container whose class has the documented name."""
    return type(group, (Container,), {})() if group else Container()
