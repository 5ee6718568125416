"""The tensors of one or several safetensors files as one table of shapes, opened only when they are read."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from library.core.log import get_logger, warn_once
from library.core.tensor_file import listing, read_header

logger = get_logger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by key, often with the prefix of one component removed."""

FLOATS = {"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"}
SCALES = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|scale_input|weight_scale|input_scale|comfy_quant)")  # beside weights to be multiplied


class Weights:
    """Tensors by name, over all files; `rename` gives each its name here, or None to leave it out.

    Raises `ValueError` for broken files (see `read_header`).
    """

    def __init__(self, paths: Iterable[Path], rename: Callable[[str], str | None] = lambda key: key) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        self._dtypes: dict[str, str] = {}
        for path in paths:
            self._add(path, rename)

    def under(self, prefix: str) -> Shapes:
        """The shapes of the tensors whose names start with `prefix`, without it."""
        return {key.removeprefix(prefix): shape for key, shape in self.shapes.items() if key.startswith(prefix)}

    def check_plain(self, prefix: str = "") -> None:
        """Raise `ValueError` for tensors under `prefix` that are not plain floating point numbers: they cannot be trained on."""
        names = [name for name in self.shapes if name.startswith(prefix)]
        for what, bad in (
            ("quantised or integer weights, which cannot be trained on", [name for name in names if self._dtypes[name] not in FLOATS]),
            ("scaled weights; give the file in fp16 or bf16, or in plain fp8", [name for name in names if SCALES.fullmatch(name)]),
        ):
            if bad:
                raise ValueError(f"{self._places[bad[0]][0]}: holds {what}: {listing(bad)}")

    def read(self, names: Iterable[str]) -> Iterator[Tensor]:
        """The named tensors, in order, memory-mapped."""
        with ExitStack() as stack:
            opened = {
                path: stack.enter_context(safe_open(str(path), framework="pt")) for path in {path for path, _ in self._places.values()}
            }
            for name in names:
                path, key = self._places[name]
                yield opened[path].get_tensor(key)

    def _add(self, path: Path, rename: Callable[[str], str | None]) -> None:
        header = read_header(path)
        kept = {key: name for key in header.tensors if (name := rename(key)) is not None}
        for key, name in kept.items():
            self.shapes[name] = header.tensors[key].shape
            self._places[name] = (path, key)
            self._dtypes[name] = header.tensors[key].dtype


def leave_out(constants: re.Pattern[str], unused: tuple[str, ...] = (), says: bool = True) -> Callable[[str], str | None]:
    """A `rename` that leaves out keys that match `constants`, which carry nothing, and keys under `unused`, said once where `says`."""

    def rename(key: str) -> str | None:
        prefix = next((prefix for prefix in unused if key.startswith(prefix)), None)
        if prefix is not None and says:
            warn_once(logger, f"the tensors under '{prefix}' of the checkpoint are ignored")
        return None if prefix is not None or constants.fullmatch(key) else key

    return rename
