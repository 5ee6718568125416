"""What every family answers, by discovery."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.core.command_line import parse_command_line
from library.core.options import declared
from library.core.tensor_file import load_tensors, save_tensors
from library.data.batch import Sizes
from library.models.architecture import Architecture, Models, architecture_named, architecture_names, architecture_of
from library.training.run import option_groups

CPU = torch.device("cpu")
SIDE = 64


@dataclass
class Loaded:
    arch: Architecture
    options: Any
    models: Models

    def text(self, *captions: str) -> dict[str, Tensor]:
        tokens = self.arch.tokenize(self.models.tokenizers, captions, self.options)
        return self.arch.encode_text(self.models.text_encoders, tokens)

    def noisy(self, batch: int = 2) -> Tensor:
        side = SIDE // self.arch.pixels_per_latent
        return torch.randn(batch, self.arch.latent_channels, side, side, generator=torch.Generator().manual_seed(0))

    def predict(self, text: dict[str, Tensor], noisy: Tensor) -> Tensor:
        size = torch.full((len(noisy), 2), SIDE)
        times = self.arch.noise_process().timesteps(noisy.shape, torch.Generator().manual_seed(1))
        return self.arch.predict(self.models.denoiser, noisy, times, text, Sizes(original=size, crop=size * 0, target=size))


@pytest.fixture(scope="module", params=architecture_names())
def family(request: pytest.FixtureRequest, small_model_options: Callable[[str], tuple[str, ...]]) -> Loaded:
    arch = architecture_named(request.param)
    given = parse_command_line([arch.ModelOptions], small_model_options(arch.name), prog="test", about="test")
    options = given[arch.ModelOptions]
    return Loaded(arch, options, arch.load(options, device=CPU, dtype=torch.float32))


def test_models_come_frozen_in_eval_mode_and_are_recognised(family: Loaded) -> None:
    models = family.models
    assert models.vae is not None
    for module in (models.denoiser, *models.text_encoders, models.vae):
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert architecture_of(models.denoiser) is family.arch
    assert len(models.text_encoders) == len(family.arch.parts) - 1


def test_images_and_latents_go_both_ways(family: Loaded) -> None:
    assert family.models.vae is not None
    pixels = torch.rand(2, 3, SIDE, SIDE + family.arch.resolution_step, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.arch.encode_images(family.models.vae, pixels, None)
    cells = [side // family.arch.pixels_per_latent for side in pixels.shape[2:]]
    assert latents.shape == (2, family.arch.latent_channels, *cells) and latents.dtype is torch.float32
    torch.testing.assert_close(latents, family.arch.encode_images(family.models.vae, pixels, None))
    drawn = family.arch.encode_images(family.models.vae, pixels, torch.Generator().manual_seed(0))
    assert drawn.shape == latents.shape and not torch.equal(drawn, latents)
    back = family.arch.decode_latents(family.models.vae, latents)
    assert back.shape == pixels.shape and back.abs().max() <= 1 and back.dtype is torch.float32


def test_text_states_have_the_keys_that_caches_keep(family: Loaded) -> None:
    states = family.text("a red cat", "")
    assert tuple(states) == family.arch.text_keys and all(len(state) == 2 for state in states.values())
    assert all(torch.isfinite(state).all() for state in states.values())


def test_a_captions_states_do_not_depend_on_its_neighbours(family: Loaded) -> None:
    alone, together = family.text("a red cat"), family.text("a dog, blue, photo of the dog", "a red cat")
    for key in family.arch.text_keys:
        torch.testing.assert_close(alone[key][0], together[key][1], rtol=1e-4, atol=1e-5)


def test_the_guess_has_the_shape_of_the_latents_and_heeds_the_text(family: Loaded) -> None:
    noisy = family.noisy()
    guess, other = family.predict(family.text("a red cat", ""), noisy), family.predict(family.text("a blue dog", ""), noisy)
    assert guess.shape == noisy.shape and torch.isfinite(guess).all()
    assert (guess[0] - other[0]).abs().max() > 1e-5
    torch.testing.assert_close(guess[1], other[1], rtol=1e-4, atol=1e-5)


def test_text_worked_out_once_gives_the_same_guess(family: Loaded) -> None:
    text, noisy = family.text("a red cat", ""), family.noisy()
    torch.testing.assert_close(family.predict(family.arch.conditioned(family.models.denoiser, text), noisy), family.predict(text, noisy))


def test_states_that_a_cache_gave_back_give_the_same_guess(family: Loaded) -> None:
    text, noisy = family.text("a red cat", ""), family.noisy()
    kept = {name: torch.stack([row.clone() for row in state]) for name, state in text.items()}
    torch.testing.assert_close(family.predict(kept, noisy), family.predict(text, noisy))


def test_tokens_beyond_the_limit_are_counted(family: Loaded) -> None:
    fits, long = family.arch.overlong(family.models.tokenizers, ["a red cat", "cat " * 2000], family.options)
    assert fits == 0 and long > 1000


def test_caches_are_named_by_the_bytes_of_the_models_not_by_their_place(family: Loaded, tmp_path: Path) -> None:
    moved = dataclasses.replace(family.options, **_copies(family, tmp_path))
    assert family.arch.latents_identity(moved) == family.arch.latents_identity(family.options)
    assert family.arch.text_identity(moved) == family.arch.text_identity(family.options)


@pytest.mark.parametrize("of", ["latents_identity", "text_identity"])
def test_a_retrained_model_has_caches_of_its_own(family: Loaded, tmp_path: Path, of: str) -> None:
    identity = getattr(family.arch, of)
    changed = []
    for name, copy in _copies(family, tmp_path).items():
        tensors = load_tensors(copy)
        save_tensors(copy, {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in tensors.items()})
        changed.append(identity(dataclasses.replace(family.options, **{name: copy})) != identity(family.options))
    assert any(changed)


def test_what_encodes_can_be_loaded_alone(family: Loaded) -> None:
    vae = family.arch.load_vae(family.options, device=CPU, dtype=torch.float32)
    encoders, tokenizers = family.arch.load_text(family.options, device=CPU, dtype=torch.float32)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert family.models.vae is not None
    assert torch.equal(family.arch.encode_images(vae, pixels, None), family.arch.encode_images(family.models.vae, pixels, None))
    text = [family.arch.encode_text(models, family.arch.tokenize(words, ["a red cat"], family.options))
            for models, words in ((encoders, tokenizers), (family.models.text_encoders, family.models.tokenizers))]  # fmt: skip
    assert all(torch.equal(text[0][key], text[1][key]) for key in family.arch.text_keys)


def _copies(family: Loaded, folder: Path) -> dict[str, str]:
    """Copies of the files that the options name, with the folders of their tokenizers beside them."""
    copies = {}
    for field in dataclasses.fields(family.options):
        given = getattr(family.options, field.name)
        if isinstance(given, str) and (source := Path(given)).is_file():
            for beside in source.parent.glob(f"{source.stem}.*"):
                if beside.is_dir() and not (folder / beside.name).exists():
                    (folder / beside.name).symlink_to(beside)
            copies[field.name] = str(shutil.copyfile(source, folder / source.name))
    return copies


def test_an_option_is_declared_or_refused_never_both(family: Loaded) -> None:
    names = {entry.name for group in option_groups(family.arch) for entry in declared(group)}
    assert not names & set(family.arch.refused)


def test_the_noise_process_draws_a_timestep_for_each_sample_and_weighs_it(family: Loaded) -> None:
    process, latents = family.arch.noise_process(), family.noisy(5)
    times = process.timesteps(latents.shape, torch.Generator().manual_seed(0))
    assert times.shape == (5,) and process.loss_weights(times).shape == (5,)
    assert process.corrupt(latents, latents * 2, times).shape == process.target(latents, latents * 2, times).shape == latents.shape


def test_the_model_of_another_family_is_refused_by_the_name_of_its_kind(
    family: Loaded, small_model_options: Callable[[str], tuple[str, ...]]
) -> None:
    for name in architecture_names():
        if name == family.arch.name:
            continue
        other = parse_command_line([architecture_named(name).ModelOptions], small_model_options(name), prog="test", about="test")
        path = other[architecture_named(name).ModelOptions].pretrained_model_name_or_path
        options = dataclasses.replace(family.options, pretrained_model_name_or_path=path)
        with pytest.raises(ValueError) as caught:
            family.arch.load(options, device=CPU, dtype=torch.float32)
        assert path in str(caught.value) and architecture_named(name).title in str(caught.value)
