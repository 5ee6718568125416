"""Every spelling of the names of a model's layers: kohya's underscores or dots, any tool's prefix, any library's paths."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from library.core.tensor_file import listing
from library.models.naming import Naming, Part, Target
from networks.formats.families import seems_for, underscored

OUTER = "base_model_model_"  # PEFT wraps the model twice
LIMIT = 12  # names in a message

Values = TypeVar("Values")
Parts = Sequence[tuple[Part, nn.Module]]


class NameTable:
    """The layers of the models at hand, by any spelling. Canonical names win; a spelling of two layers is none."""

    def __init__(self, naming: Naming, parts: Parts) -> None:
        self.naming = naming
        self.order: dict[str, tuple[Part, Target, nn.Module]] = {}  # canonical name -> its place, in table order
        self._paths: dict[str, dict[str, set[str]]] = {}  # part -> underscored path -> canonical names
        for part, module in parts:
            layers = dict(module.named_modules())
            targets = [*naming.targets(part, module), *naming.outside(part, module)]
            for target in targets:
                self.order.setdefault(target.name, (part, target, layers[target.module_path]))
            self._paths[part.name] = _paths(targets)
        self._prefixes = sorted(_prefixes(naming), key=lambda pair: -len(pair[0]))

    def candidates(self, name: str) -> set[str]:
        """The canonical names that a spelling may mean: none, one, or several that it does not tell apart."""
        if name in self.order:
            return {name}
        spelling = underscored(name)
        while spelling.startswith(OUTER):
            spelling = spelling.removeprefix(OUTER)
        found: set[str] = set()
        for prefix, part in self._prefixes:
            if spelling.startswith(prefix):
                found |= self._paths.get(part.name, {}).get(spelling[len(prefix) :], set())
        return found

    def canonical(self, name: str) -> str | None:
        """The canonical name of a spelling; None for one of no layer or of several."""
        found = self.candidates(name)
        return next(iter(found)) if len(found) == 1 else None

    def is_left_out(self, name: str) -> bool:
        """Whether a name is of a text encoder that is not at hand."""
        spelling = underscored(name).removeprefix(OUTER)
        part = next((part for prefix, part in self._prefixes if prefix and spelling.startswith(prefix)), None)
        return part is not None and not part.is_denoiser and part.name not in self._paths

    def spellings(self) -> Iterator[tuple[str, str]]:
        """Every spelling with dots written as underscores, and the canonical name that it means."""
        for prefix, part in self._prefixes:
            for path, names in self._paths.get(part.name, {}).items():
                if len(names) == 1 and (name := self.canonical(prefix + path)) is not None:
                    yield prefix + path, name

    def sort(self, layers: Mapping[str, Values]) -> tuple[dict[str, Values], list[str], list[str]]:
        """The layers of a file by canonical name in table order, the names of text encoders not at hand, and what is wrong.

        Problems name layers that these models have not, with the family that the file seems to be for; spellings of several layers;
        and layers named twice.
        """
        spelled: dict[str, list[str]] = {}
        left_out, unknown, unclear = [], [], []
        for name in layers:
            found = self.candidates(name)
            if len(found) == 1:
                spelled.setdefault(next(iter(found)), []).append(name)
            elif found:
                unclear.append(f"{name} ({' or '.join(sorted(found)[:3])})")
            else:
                (left_out if self.is_left_out(name) else unknown).append(name)
        twice = [" and ".join(names) for names in spelled.values() if len(names) > 1]
        problems = [f"two spellings of the same layer: {listing(twice, LIMIT)}"] if twice else []
        problems += [f"{len(unclear)} names may be of several layers: {listing(unclear, LIMIT)}"] if unclear else []
        problems += [self._refusal(unknown, len(layers))] if unknown else []
        found = {name: layers[spelled[name][0]] for name in self.order if len(spelled.get(name, ())) == 1}
        return found, left_out, problems

    def resolve(self, layers: Mapping[str, Values]) -> tuple[dict[str, Values], list[str]]:
        """The layers by canonical name, and the names of text encoders not at hand. Raises `ValueError` with all that is wrong."""
        found, left_out, problems = self.sort(layers)
        if problems:
            raise ValueError("; ".join(problems))
        return found, left_out

    def _refusal(self, unknown: Sequence[str], total: int) -> str:
        title = self.naming.title
        family = seems_for(unknown)
        hint = f"the file seems to be for {family}: " if family and family != title else ""
        example = next(iter(self.order), "none")
        return (
            f"{hint}{len(unknown)} of {total} adapters are for layers that this {title} model has not: {listing(unknown, LIMIT)} "
            f"({title} names look like {example})"
        )


def _paths(targets: Sequence[Target]) -> dict[str, set[str]]:
    """Canonical names by underscored path. The paths of one kind do not hide those of the kinds before: the original's come first."""
    main = targets[0].diffusers_path.partition(".")[0] if targets else ""
    table: dict[str, set[str]] = {}
    for kind in (_original, _at_hand, _in_pipeline, lambda target: _in_component(target, main)):
        own: dict[str, set[str]] = {}
        for target in targets:
            for path in filter(None, kind(target)):
                own.setdefault(underscored(path), set()).add(target.name)
        table = own | table
    return table


def _original(target: Target) -> Iterable[str]:
    return (target.path,)


def _at_hand(target: Target) -> Iterable[str]:
    return (target.module_path,)


def _in_pipeline(target: Target) -> Iterable[str]:
    return (target.diffusers_path,)


def _in_component(target: Target, main: str) -> Iterable[str]:
    """Without the component, where that is the part's main one: the layers of another would be taken for this one's."""
    component, _, inside = target.diffusers_path.partition(".")
    return (inside if component == main else "", *target.other_paths)


def _prefixes(naming: Naming) -> Iterator[tuple[str, Part]]:
    """What may stand before a path, underscored, with the part that it tells; LyCORIS numbers a single text encoder too."""
    encoders = [part for part in naming.parts if not part.is_denoiser]
    for part in naming.parts:
        numbered = [] if part.is_denoiser else [f"lora_te{encoders.index(part) + 1}"]
        named = [part.prefix, *numbered, part.comfyui_prefix, *part.other_prefixes]
        for prefix in dict.fromkeys(underscored(f"{prefix}.") for prefix in named if prefix):
            yield prefix, part
        yield "", part
