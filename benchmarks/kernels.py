"""Triton kernels against their PyTorch forms on a GPU, at the shapes of SDXL and Anima: `python -m benchmarks.kernels [--dtype bfloat16]`.

Both forms take turns in one process; medians of their ratios within a turn, and the kernel's error and the form's against float64.
Writes `benchmarks/results/kernels.json` and a table to the screen. Without a GPU there is nothing to measure, and it says so.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.measure import repeats_for, seconds_of
from library.core.text_table import table
from networks.kernels.triton import hadamard, linear, machine, mixing

RESULTS = results.FOLDER / "kernels.json"
TURNS = 15
WEIGHTS = ((640, 640), (1280, 1280), (10240, 1280), (1280, 5120), (2048, 2048), (8192, 2048))  # (out, in)
TOKENS = (77, 1024, 4096)
RANKS = (4, 16, 32, 64)
MIXES = ((8, 8, 160), (8, 8, 16), (16, 16, 80), (32, 64, 16), (64, 128, 64))  # w1 (A, B), and the columns of a block

Result = Tensor | tuple[Tensor, ...] | list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One computation: as a kernel, as PyTorch, and on float64 copies of what it is given."""

    name: str
    kernel: Callable[..., Result]
    composed: Callable[..., Result]
    given: tuple[Tensor, ...]

    def error(self, form: Callable[..., Result]) -> float:
        """The largest relative error of a form's results against float64."""
        exact = _tensors(self.composed(*(tensor.double() for tensor in self.given)))
        found = _tensors(form(*self.given))
        return max(float((one.double() - truth).norm() / truth.norm()) for one, truth in zip(found, exact, strict=True))

    def row(self) -> dict[str, object]:
        """Microseconds of both forms, the median ratio of the kernel's, and their errors."""
        runs = [lambda: self.kernel(*self.given), lambda: self.composed(*self.given)]
        device = self.given[0].device.type
        for run in runs:
            run()  # compiles
        repeats = [repeats_for(run, device) for run in runs]
        turns = [[seconds_of(run, device, count) for run, count in zip(runs, repeats, strict=True)] for _ in range(TURNS)]
        kernel, composed = (statistics.median(times) for times in zip(*turns, strict=True))
        return {
            "case": self.name,
            "kernel us": round(1e6 * kernel, 1),
            "composed us": round(1e6 * composed, 1),
            "ratio": round(statistics.median(ours / theirs for ours, theirs in turns), 3),
            "kernel error": f"{self.error(self.kernel):.1e}",
            "composed error": f"{self.error(self.composed):.1e}",
        }


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel at every shape. LoHa's factors are float32, as they are while training."""
    for out, inner in WEIGHTS:
        weight = random(out, inner, dtype=dtype)
        for rank in RANKS:
            factors = random(out, rank), random(rank, inner), random(out, rank), random(rank, inner)
            where = f"{out}x{inner} rank {rank}"
            yield Case(name=f"hadamard_weight {where}", kernel=_weight, composed=_composed_weight, given=(*factors, weight))
            yield Case(
                name=f"hadamard_gradients {where}",
                kernel=hadamard.hadamard_gradients,
                composed=hadamard.composed_hadamard_gradients,
                given=(weight, *factors),
            )
        yield from linear_cases(weight)
    for outer, inner, width in MIXES:
        for tokens in TOKENS:
            blocks = random(tokens, inner, width, dtype=dtype)
            yield Case(
                name=f"kronecker_mix {outer}x{inner}x{width} tokens {tokens}",
                kernel=mixing.kronecker_mix,
                composed=mixing.composed_kronecker_mix,
                given=(random(outer, inner, dtype=dtype), blocks),
            )


def linear_cases(weight: Tensor) -> Iterator[Case]:
    """A frozen layer with a LoRA of rank 16 for every number of tokens: alone, as three layers of one input, and backwards."""
    out, inner = weight.shape
    up, down = random(out, 16, dtype=weight.dtype), random(16, inner, dtype=weight.dtype)
    for tokens in TOKENS:
        x, grad, hidden = (random(tokens, size, dtype=weight.dtype) for size in (inner, out, 16))
        where = f"{out}x{inner} tokens {tokens}"
        yield Case(name=f"linear {where}", kernel=_linear, composed=_composed_linear, given=(x, weight, hidden, up))
        yield Case(name=f"three linears {where}", kernel=_linears, composed=_composed_linears, given=(x, weight, hidden, up))
        yield Case(name=f"input gradient {where}", kernel=_linear, composed=_composed_linear, given=(grad, weight.T, hidden, down.T))


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded random numbers on the GPU."""
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(sum(shape)), device="cuda").to(dtype)


def _weight(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, base: Tensor) -> Tensor:
    return hadamard.hadamard_weight(a1, b1, a2, b2, 0.5, base)


def _composed_weight(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, base: Tensor) -> Tensor:
    return hadamard.composed_hadamard_weight(a1, b1, a2, b2, 0.5, base)


def _linear(x: Tensor, weight: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    return linear.extended_linear(x, weight, None, hidden, up, 0.5)


def _composed_linear(x: Tensor, weight: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    return linear.composed_extended_linear(x, weight, None, hidden, up, 0.5)


def _linears(x: Tensor, weight: Tensor, hidden: Tensor, up: Tensor) -> list[Tensor]:
    return linear.extended_linears(x, [weight] * 3, [None] * 3, [hidden] * 3, [up] * 3, 0.5)


def _composed_linears(x: Tensor, weight: Tensor, hidden: Tensor, up: Tensor) -> list[Tensor]:
    return linear.composed_extended_linears(x, [weight] * 3, [None] * 3, [hidden] * 3, [up] * 3, 0.5)


def _tensors(result: Result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def main() -> str | None:
    """Measure, write the results, print them. The message of an exit where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Triton kernels against their PyTorch forms.")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights and activations")
    parser.add_argument("--filter", default="", help="only cases whose name has this in it")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if not torch.cuda.is_available() or not machine.can_read(torch.empty(0, dtype=dtype, device="cuda")):
        return "benchmarks.kernels: no GPU that the kernels run on (CUDA, compute capability 8.0 or more, Triton); nothing was measured"
    rows = [case.row() for case in cases(dtype) if options.filter in case.name]
    facts = results.machine("cuda") | {"dtype": options.dtype, "turns": TURNS}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]) if rows else "no case has that name")
    print(facts)
    return None


if __name__ == "__main__":
    sys.exit(main())
