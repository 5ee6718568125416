"""sd-scripts' cached text of SDXL: its pooled vector, made with the projection the wrong way round, comes out right or is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from library.data.caches.npz import read_text
from library.models.architecture import Models
from library.models.sdxl.configuration import LATENT_SCALE
from library.models.sdxl.npz import Mending, text_files
from library.models.sdxl.spec import ARCHITECTURE, ModelOptions


@pytest.fixture
def options(small_sdxl_file: Path) -> ModelOptions:
    return ModelOptions(pretrained_model_name_or_path=str(small_sdxl_file), max_token_length=150)


@pytest.fixture
def models(options: ModelOptions) -> Models:
    return ARCHITECTURE.load(options, device=torch.device("cpu"), dtype=torch.float32)


def written(folder: Path, models: Models, options: ModelOptions, caption: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file that sd-scripts would have left for a caption, and the right states."""
    tokens = ARCHITECTURE.tokenize(models.tokenizers, [caption], options)
    states = {name: tensor[0] for name, tensor in ARCHITECTURE.encode_text(models.text_encoders, tokens).items()}
    encoder: Any = models.text_encoders[1]
    weight, width = encoder.text_projection.weight, models.text_encoders[0].config.hidden_size  # pyright: ignore
    projected = torch.linalg.solve(weight.double(), states["pooled"].double())
    arrays = {"hidden_state1": states["hidden_states"][:, :width], "hidden_state2": states["hidden_states"][:, width:],
              "pool2": (projected @ weight.double()).float()}  # fmt: skip
    path = folder / "a_te_outputs.npz"
    np.savez(path, **{name: array.numpy() for name, array in arrays.items()})
    return path, states


def test_states_of_sd_scripts_come_out_as_ours(models: Models, options: ModelOptions, tmp_path: Path):
    path, wanted = written(tmp_path, models, options, "a red cat")
    npz = ARCHITECTURE.npz_text(models.text_encoders, options)
    assert npz is not None and npz.problem is not None
    with np.load(path) as arrays:
        assert {name: arrays[name].shape for name in npz.shapes} == dict(npz.shapes)
        assert npz.problem(arrays) is None
        assert np.linalg.norm(arrays["pool2"] - wanted["pooled"].numpy()) > 0.1  # the projection is not symmetric
    states = read_text(path, npz)
    assert torch.equal(states["hidden_states"], wanted["hidden_states"])
    torch.testing.assert_close(states["pooled"], wanted["pooled"], atol=1e-4, rtol=1e-4)


def test_latents_of_sd_scripts_are_scaled():
    stored = torch.randn(4, 8, 8)
    assert torch.equal(ARCHITECTURE.npz_latents().ready(stored), stored * LATENT_SCALE)


def spread_over(spread: float) -> torch.Tensor:
    """A matrix (64, 64) whose singular values lie between 1 and 1 / spread."""
    left, _, right = torch.linalg.svd(torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    values = torch.logspace(0, -float(np.log10(spread)), 64, dtype=torch.float64) if np.isfinite(spread) else torch.arange(64).double()
    return left @ values.diag() @ right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_the_expected_error_is_about_the_one_that_rounding_makes(dtype: torch.dtype, spread: float):
    generator, weight = torch.Generator().manual_seed(0), spread_over(spread)
    mending = Mending(weight)
    ratios = []
    for _ in range(20):
        projected = torch.randn(64, generator=generator, dtype=torch.float64)
        rounded = (projected @ weight).to(dtype).double()
        right_one = projected @ weight.T
        states = mending.text_states({"hidden_state1": np.zeros((1, 1)), "hidden_state2": np.zeros((1, 1)), "pool2": rounded.numpy()})
        error = float((states["pooled"].double() - right_one).norm() / right_one.norm())
        ratios.append(mending.error(rounded) / max(error, 1e-9))
    assert 0.5 < float(np.median(ratios)) < 4


@pytest.mark.parametrize(("spread", "serves"), [(1.0, True), (1e6, False), (float("inf"), False)])
def test_a_projection_that_cannot_be_undone_exactly_is_refused(spread: float, serves: bool):
    weight = spread_over(spread)
    projected = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Mending(weight).problem({"pool2": (projected @ weight).half().float().numpy()})
    assert (problem is None) is serves
    assert serves or "transposed projection" in str(problem)


def test_a_projection_that_is_not_square_hides_what_it_projected():
    assert text_files(77, (8, 8), torch.zeros(4, 8)) is None
