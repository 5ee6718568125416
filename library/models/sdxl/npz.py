"""sd-scripts' cached text states of SDXL: what its files hold, and its pooled vector made right.

sd-scripts multiplies with the projection matrix untransposed. Where that matrix can be inverted, the vector that it projected, and
with it the right pooled vector, follow from the wrong one; how exactly depends on the precision in which that was rounded.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from library.data.batch import TextStates
from library.data.caches.npz import Arrays, NpzText

MOST_ERROR = 0.005  # of the pooled vector, relative to its norm: what half precision costs anywhere else
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # unit roundoff


def text_files(positions: int, widths: tuple[int, int], projection: Tensor) -> NpzText | None:
    """How the files are named and read, for `projection`, the weight (out, in) of encoder 2's; None where it is not square."""
    if projection.shape[0] != projection.shape[1]:
        return None
    mending = Mending(projection.detach().cpu())
    shapes = {"hidden_state1": (positions, widths[0]), "hidden_state2": (positions, widths[1]), "pool2": (projection.shape[0],)}
    return NpzText(suffix="_te_outputs.npz", shapes=shapes, ready=mending.text_states, problem=mending.problem)


@dataclass(frozen=True)
class Mending:
    """From the pooled vector of sd-scripts, h W for the projection's weight W (out, in), to h W^T."""

    projection: Tensor

    def text_states(self, arrays: Arrays) -> TextStates:
        """The states of one caption: `hidden_states` (positions, width 1 + width 2) and `pooled` (projection), float32."""
        states = [torch.from_numpy(arrays[name].astype(np.float32)) for name in ("hidden_state1", "hidden_state2")]
        pooled = torch.from_numpy(arrays["pool2"].astype(np.float64)) @ self._matrix
        return {"hidden_states": torch.cat(states, dim=-1), "pooled": pooled.float()}

    def problem(self, arrays: Arrays) -> str | None:
        """Why a file does not serve: its pooled vector was rounded too coarsely to be made right."""
        error = self.error(torch.from_numpy(arrays["pool2"].astype(np.float64)))
        return None if error <= MOST_ERROR else "with a pooled vector that is rounded too coarsely to undo its transposed projection"

    def error(self, pooled: Tensor) -> float:
        """The expected relative error of the vector made right: roundings of the wrong one, each enlarged by its row of the matrix."""
        unit = max(_rounding(pooled), ROUNDING.get(self.projection.dtype, 0.0))
        enlarged = (pooled * self._matrix.norm(dim=1)).norm() / (pooled @ self._matrix).norm()
        error = float(enlarged) * unit / math.sqrt(3)
        return error if math.isfinite(error) else math.inf

    @cached_property
    def _matrix(self) -> Tensor:
        """W^-1 W^T in float64; not finite where W has no inverse."""
        weight = self.projection.double()
        solved, info = torch.linalg.solve_ex(weight, weight.T)
        return solved if info == 0 else torch.full_like(weight, math.nan)


def _rounding(pooled: Tensor) -> float:
    """The unit roundoff of the coarsest precision that holds all of these numbers."""
    return next((unit for dtype, unit in ROUNDING.items() if torch.equal(pooled.to(dtype).double(), pooled)), 2.0**-53)
