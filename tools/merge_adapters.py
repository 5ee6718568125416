"""Merge adapters into a checkpoint, or several into one adapter: `python -m tools.merge_adapters --help`.

Into a checkpoint: streamed, so that memory holds one tensor at a time; summed in float32, rounded once. Into one adapter: exact.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from json import dumps
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from library.core.command_line import parse_command_line, run_script
from library.core.file_hash import file_sha256
from library.core.log import set_up_logging
from library.core.options import option
from library.core.tensor_file import file_name, read_header
from library.core.text_table import table
from networks.checkpoint_merge import Merge, merge_into
from networks.network import Network
from networks.open_file import open_adapter
from networks.rewriting.algebra import check_wish
from networks.rewriting.combination import combined, structure, truncated

PRECISIONS = {"keep": None, "fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
ABOUT_THE_BASE = (
    "ss_base_model",
    "ss_sd_model",
    "ss_v2",
    "modelspec.sai_",
    "modelspec.arch",
    "modelspec.impl",
    "modelspec.pred",
    "modelspec.res",
)


@dataclass(kw_only=True, frozen=True)
class MergeOptions:
    """What is merged, and where it goes."""

    adapters: tuple[str, ...] = option(help="adapter files or PEFT folders of any supported format")
    strengths: tuple[float, ...] = option((), help="a strength for each adapter, in their order; 1 for all if not given")
    checkpoint: Path | None = option(None, help="the base model, a .safetensors file or a diffusers folder: merged into with --out")
    out: Path | None = option(None, help="the merged checkpoint to write: a .safetensors file, or a folder if the base model is one")
    out_adapter: Path | None = option(None, help="the one adapter to write instead, a .safetensors file: the exact sum of all")
    precision: Literal["keep", "fp16", "bf16", "float"] = option(
        "keep", help="of all floating tensors written; keep: those of the checkpoint, and float for an adapter"
    )
    rank: int | None = option(None, help="with --out_adapter: reduce layers to this rank afterwards")
    max_error: float | None = option(None, help="with --out_adapter: reduce layers to the lowest rank with this relative error")
    family: str | None = option(None, help="the model family, such as sdxl, where the adapters' names do not tell it")
    allow_partial: bool = option(False, help="leave out what is not understood or not in the checkpoint, and name it, instead of refusing")

    def check(self) -> Iterable[str]:
        """Problems between the options."""
        if self.strengths and len(self.strengths) != len(self.adapters):
            yield f"--strengths: {len(self.strengths)} strengths for {len(self.adapters)} adapters; give one for each"
        if not all(map(isfinite, self.strengths)):
            yield "--strengths: must be finite numbers"
        if not self.adapters:
            yield "--adapters: give at least one"
        if (self.out is None) == (self.out_adapter is None):
            yield "give either --out (a merged checkpoint) or --out_adapter (one adapter)"
        if self.out is not None and self.checkpoint is None:
            yield "--out: needs --checkpoint, the base model to merge into"
        if self.out_adapter is None and (self.rank is not None or self.max_error is not None):
            yield "--rank, --max_error: only for --out_adapter"
        try:
            check_wish(self.rank, self.max_error)
        except ValueError as error:
            yield f"--{error}"
        for path, is_folder in ((self.out, self.checkpoint is not None and self.checkpoint.is_dir()), (self.out_adapter, False)):
            if path is not None and not is_folder and path.suffix != ".safetensors":
                yield f"{path}: only .safetensors files are written"
        inputs = [Path(file).resolve() for file in (*self.adapters, *([self.checkpoint] if self.checkpoint else []))]
        if any(path is not None and path.resolve() in inputs for path in (self.out, self.out_adapter)):
            yield "the result would replace one of the files that it is made of; give it another name"

    @property
    def weighted(self) -> list[tuple[str, float]]:
        """Every adapter file with its strength."""
        return list(zip(self.adapters, self.strengths or (1.0,) * len(self.adapters), strict=True))


def main(argv: list[str]) -> None:
    """Merge as the command line says, and print what was merged. Raises `ValueError` for what the user has to mend."""
    set_up_logging()
    options = parse_command_line([MergeOptions], argv, prog="python -m tools.merge_adapters", about="Merge adapters.")[MergeOptions]
    networks = [
        open_adapter(Path(file), family=options.family, base=options.checkpoint, allow_partial=options.allow_partial)
        for file in options.adapters
    ]
    families = {network.naming.name: file for network, file in zip(networks, options.adapters, strict=True)}
    if len(families) > 1:
        raise ValueError(f"the adapters are for different families: {', '.join(f'{file} for {name}' for name, file in families.items())}")
    if options.out is not None:
        into_checkpoint(options, networks, options.out)
    else:
        into_adapter(options, networks, options.out_adapter or Path())


def into_checkpoint(options: MergeOptions, networks: Sequence[Network], out: Path) -> None:
    """Merge into the base model, tensor by tensor."""
    assert options.checkpoint is not None
    merges = [Merge(members=network.members, strength=strength) for network, (_, strength) in zip(networks, options.weighted, strict=True)]
    metadata = described(options, options.checkpoint)
    written = merge_into(
        options.checkpoint,
        out,
        networks[0].naming,
        networks[0].parts,
        merges,
        precision=PRECISIONS[options.precision],
        metadata=metadata,
        allow_partial=options.allow_partial,
    )
    rows = [[*row, *spread(merge.relative_changes)] for row, merge in zip(inputs(options, networks), merges, strict=True)]
    print(table(["adapter", "layers", "parameters", "strength", "change: median", "max"], rows))
    for file in written:
        print(f"wrote {file.path}: {file.size:,} bytes, SHA-256 {file.sha256}")


def into_adapter(options: MergeOptions, networks: Sequence[Network], out: Path) -> None:
    """Add up to one adapter."""
    network = combined(networks, [strength for _, strength in options.weighted], options.checkpoint)
    dtype = PRECISIONS[options.precision] or torch.float32
    errors: dict[str, float] = {}
    if options.rank is not None or options.max_error is not None:
        network, errors = truncated(network, options.rank, options.max_error, dtype)
    headers = [read_header(file).metadata for file in options.adapters if Path(file).suffix == ".safetensors"]
    shared = set.intersection(*(set(metadata.items()) for metadata in headers)) if headers else set()
    base = {key: value for key, value in shared if key.startswith(ABOUT_THE_BASE)}
    network.save_weights(out, dtype, base | structure(network) | described(options))
    print(table(["adapter", "layers", "parameters", "strength"], inputs(options, networks)))
    print()
    print(table(["result", "layers", "ranks", "parameters"], results(network)))
    if errors:
        print(f"reduced: relative error {median(errors.values()):.2e} (median of {len(errors)} layers), {max(errors.values()):.2e} (max)")
    print(f"wrote {out}: {out.stat().st_size:,} bytes, SHA-256 {file_sha256(out)}")


def described(options: MergeOptions, checkpoint: Path | None = None) -> dict[str, str]:
    """What was merged, as metadata: by title for people, by file, strength and hash for tools."""
    files = [*([str(checkpoint)] if checkpoint else []), *options.adapters]
    entries = [
        {"file": Path(file).name, "strength": strength, "sha256": file_sha256(file) if Path(file).is_file() else None}
        for file, strength in options.weighted
    ]
    return {"modelspec.merged_from": ", ".join(file_name(file) for file in files), "ss_merged_adapters": dumps(entries)}


def inputs(options: MergeOptions, networks: Sequence[Network]) -> list[list[str]]:
    """Rows on the adapters that were given: file, layers, parameters, strength."""
    return [
        [Path(file).name, str(len(network.members)), f"{parameters(network):,}", f"{strength:g}"]
        for (file, strength), network in zip(options.weighted, networks, strict=True)
    ]


def results(network: Network) -> list[list[str]]:
    """Rows on the one adapter that was made: algorithm, layers, ranks, parameters."""
    titles = Counter(adapter.title for adapter in network.adapters)
    rows = []
    for title, count in titles.items():
        own = [adapter for adapter in network.adapters if adapter.title == title]
        low, high = min(adapter.rank for adapter in own), max(adapter.rank for adapter in own)
        numbers = sum(parameter.numel() for adapter in own for parameter in adapter.parameters())
        rows.append([title, str(count), str(low) if low == high else f"{low} to {high}", f"{numbers:,}"])
    return rows


def spread(values: Sequence[float]) -> list[str]:
    """Median and maximum; an adapter that changes biases only has neither."""
    return [f"{median(values):.2e}", f"{max(values):.2e}"] if values else ["-", "-"]


def parameters(network: Network) -> int:
    """The numbers that an adapter has."""
    return sum(parameter.numel() for parameter in network.parameters())


if __name__ == "__main__":
    run_script(main)
