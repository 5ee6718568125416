"""Make the small trained models of the demo from seeds: `python -m tools.make_toy_models sdxl --out assets`, or `anima`.

The training can be stopped and started again: what is done lies in the scratch folder. docs/toy_models.md says what the models hold
and what was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tools.toys.make_anima import make_anima
from tools.toys.make_sdxl import make_sdxl


def main() -> None:
    """Train what the scratch folder does not hold yet, then write the model's files."""
    options = _parse()
    options.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    {"sdxl": make_sdxl, "anima": make_anima}[options.model](options.out, options.scratch)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=["sdxl", "anima"], help="which toy model to make")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder of the finished model")
    parser.add_argument("--scratch", type=Path, default=Path("toy_scratch"), help="training state; a later run goes on from it")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
