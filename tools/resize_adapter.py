"""Make an adapter smaller: `python -m tools.resize_adapter in.safetensors out.safetensors --rank 8`, or `--max_error 0.05`.

LoRA and LoKr are cut by singular values, the best there is (a LoKr keeps its first factor; the rank is that of the second). LoHa is fitted
anew from its truncated factors, which is slow and ends in a local optimum. Written with native names.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from library.core.command_line import parse_command_line, run_script
from library.core.log import set_up_logging
from library.core.options import option
from library.core.tensor_file import Header, file_name, read_header
from library.core.tensor_stream import DTYPES
from library.core.text_table import table
from networks.network import Network
from networks.open_file import open_adapter
from networks.rewriting.algebra import check_wish
from networks.rewriting.combination import structure, truncated
from networks.rewriting.factors import parameters
from tools.screen import spread, with_flags

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}
STALE_ARGUMENTS = ("conv_dim", "conv_alpha")  # ranks differ from these afterwards; shapes tell
WORST = 10  # layers that are listed


@dataclass(kw_only=True, frozen=True)
class ResizeOptions:
    """What is resized, and to what."""

    adapter: Path = option(help="adapter file or PEFT folder of any supported format; may also stand first, without --adapter")
    out: Path = option(help="the .safetensors file to write; may also stand second, without --out")
    rank: int | None = option(None, help="highest rank of a layer; layers that are smaller stay as they are")
    max_error: float | None = option(None, help="give each layer the lowest rank with this error, relative to its change of weight")
    precision: Literal["keep", "fp16", "bf16", "float"] = option("keep", help="of the tensors written; keep: as in the adapter file")
    base: Path | None = option(None, help="checkpoint whose layer sizes the adapter has, where that is not the full-size model")
    family: str | None = option(None, help="the model family, such as sdxl, where the adapter's names do not tell it")
    allow_partial: bool = option(False, help="leave out what is not understood, and name it, instead of refusing")

    def check(self) -> Iterable[str]:
        """Problems of single options and between them."""
        if self.rank is None and self.max_error is None:
            yield "give --rank, --max_error or both"
        try:
            check_wish(self.rank, self.max_error)
        except ValueError as error:
            yield f"--{error}"
        if self.out.suffix != ".safetensors":
            yield f"--out {self.out}: only .safetensors files are written"
        if self.out.resolve() == self.adapter.resolve():
            yield f"--out {self.out}: would replace the adapter that is resized; give it another name"


def main(argv: list[str]) -> None:
    """Resize as the command line says, and print what it cost. Raises `ValueError` for what the user has to mend."""
    set_up_logging()
    argv = with_flags(argv, ("--adapter", "--out"))
    options = parse_command_line([ResizeOptions], argv, prog="python -m tools.resize_adapter", about="Make an adapter smaller.")
    resize(options[ResizeOptions])


def resize(options: ResizeOptions) -> None:
    """Read, cut, write and report."""
    network = open_adapter(options.adapter, family=options.family, base=options.base, allow_partial=options.allow_partial)
    header = read_header(options.adapter) if options.adapter.is_file() else Header({}, {})
    dtype = PRECISIONS.get(options.precision, stored_dtype(header))
    smaller, errors = truncated(network, options.rank, options.max_error, dtype)
    smaller.save_weights(options.out, dtype, described(options, header.metadata, smaller, errors))
    print(table(["algorithm", "layers", "ranks", "now", "parameters", "now"], summary(network, smaller)))
    print()
    print(worst(network, smaller, errors))
    if any(adapter.dora_scale is not None for adapter in network.adapters):
        print("errors of DoRA layers are of the direction; their magnitudes are kept")
    if any(adapter.title == "LoHa" and errors[adapter.name] for adapter in network.adapters):
        print("LoHa has no best fit of a rank; where the errors are too large, a LoRA made of it (tools.convert_adapter) may lose less")
    print(f"wrote {options.out}: {options.out.stat().st_size:,} bytes")


def stored_dtype(header: Header) -> torch.dtype:
    """The floating dtype that most tensors of a file have, alphas aside; float32 where there is none."""
    dtypes = Counter(DTYPES[info.dtype] for name, info in header.tensors.items() if not name.endswith("alpha"))
    return next((dtype for dtype, _ in dtypes.most_common() if dtype in PRECISIONS.values()), torch.float32)


def described(options: ResizeOptions, metadata: Mapping[str, str], network: Network, errors: Mapping[str, float]) -> dict[str, str]:
    """The metadata of the file that was read, what has changed in it, and what was done."""
    carried = {key: value for key, value in metadata.items() if not key.startswith("sshs_") and key != "modelspec.hash_sha256"}
    try:
        arguments = json.loads(carried.get("ss_network_args", ""))
    except json.JSONDecodeError:  # other tools write what they like
        arguments = None
    if isinstance(arguments, dict):
        carried["ss_network_args"] = json.dumps({key: value for key, value in arguments.items() if key not in STALE_ARGUMENTS})
    done = {"file": file_name(options.adapter), "rank": options.rank, "max_error": options.max_error}
    done["largest_error"] = round(max(errors.values(), default=0.0), 6)
    return carried | structure(network) | {"ss_resized": json.dumps(done)}


def summary(before: Network, after: Network) -> list[list[str]]:
    """A row for each algorithm: layers, ranks and parameters, before and after."""
    rows = []
    for title in dict.fromkeys(adapter.title for adapter in before.adapters):
        pairs = [(old, new) for old, new in zip(before.adapters, after.adapters, strict=True) if old.title == title]
        ranks = [spread([pair[n].rank for pair in pairs]) for n in (0, 1)]
        sizes = [f"{sum(parameters(pair[n].file_tensors()) for pair in pairs):,}" for n in (0, 1)]
        rows.append([title, str(len(pairs)), *ranks, *sizes])
    return rows


def worst(before: Network, after: Network, errors: Mapping[str, float]) -> str:
    """The errors at large, and the layers with the largest ones."""
    if not any(errors.values()):
        is_same = all(old is new for old, new in zip(before.adapters, after.adapters, strict=True))
        return "nothing was lost" + (": no layer is larger than asked for" if is_same else "")
    by_name = {adapter.name: (adapter, new) for adapter, new in zip(before.adapters, after.adapters, strict=True)}
    names = sorted(errors, key=lambda name: -errors[name])[:WORST]
    rows = [[name, str(by_name[name][0].rank), str(by_name[name][1].rank), f"{errors[name]:.4f}"] for name in names]
    total = f"relative error: {median(errors.values()):.4f} (median of {len(errors)} layers), {max(errors.values()):.4f} (largest)"
    return f"{total}\n\n{table(['worst layers', 'rank', 'now', 'error'], rows)}"


if __name__ == "__main__":
    run_script(main)
