"""Any supported adapter file as a network, without the model that it is for."""

from pathlib import Path

from library.core.tensor_file import listing
from library.models.naming import Naming, naming_named, naming_names
from networks.files import AdapterFile, read_adapter_file
from networks.formats.families import family_of, seems_for
from networks.formats.keys import by_name
from networks.formats.reader import Misfit, read_members
from networks.network import Network


def open_adapter(path: Path | str, *, family: str | None = None, base: Path | None = None, allow_partial: bool = False) -> Network:
    """The network that an adapter file or PEFT folder holds, on models without weights: its layers are on the meta device.

    `family` is a model family by name, told by the names in the file if not given; `base` is a checkpoint whose header says how large
    the models are, which are of full size otherwise. `allow_partial` skips what does not fit and says so in one warning.
    Raises `ValueError` naming the file and everything that does not fit.
    """
    file = read_adapter_file(path)
    naming = _naming_of(file) if family is None else naming_named(family)
    parts = naming.outline(None if base is None else Path(base))
    try:
        members = read_members(file, naming, parts, allow_partial=allow_partial)
    except Misfit as error:
        if base is not None:
            raise
        advice = "give the checkpoint of a smaller one, or the folder of its files, with --base, in merge_adapters with --checkpoint"
        raise Misfit(f"{error} ({naming.title} was taken at full size; {advice})") from error
    return Network(members, naming, parts)


def _naming_of(file: AdapterFile) -> Naming:
    names = list(by_name(file.tensors).keys)
    naming = family_of(names)
    if naming is None:
        other = seems_for(names)
        families = ", ".join(f"{name} ({naming_named(name).title})" for name in naming_names())
        raise ValueError(
            f"{file.path}: not an adapter of a known family, which are {families}: it holds tensors such as {listing(file.tensors, 3)}"
            + (f"; it seems to be for {other}" if other else "; give its family (--family) where the names do not tell it")
        )
    return naming
