"""Memory options in a run: they change where things are and how often they are computed, and no loss."""

from pathlib import Path
from typing import Any

import pytest
from small_family import SmallFamily
from torch import nn

from library.core.options import OptionError
from library.training import run as training_run
from library.training.memory.offload import Parked
from library.training.rules import without_effect
from library.training.run import Run

CACHED = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
CHECKPOINTED = ["--gradient_checkpointing"]
BOUNDED = pytest.param(["--activation_memory_budget", "75%"], marks=pytest.mark.slow, id="budget")
BUSY = [
    "--gradient_accumulation_steps", "2", "--network_args", "module_dropout=0.3", "--sample_every_n_steps", "1",
    "--validation_split", "0.4", "--validate_every_n_steps", "1",
]  # fmt: skip


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU stand for a GPU, as its own device."""
    monkeypatch.setattr("library.training.memory.options.swap_refusal", lambda device: None)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that were set up."""
    found: list[Run] = []
    set_up = training_run.set_up
    monkeypatch.setattr(training_run, "set_up", lambda *args: found.append(set_up(*args)) or found[-1])
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat --w 64 --h 64 --s 2\n")
    return ["--sample_prompts", str(file)]


def losses(family: SmallFamily, images: Path, output: Path, *extra: str) -> list[float]:
    return family.run(images, output, "--max_train_steps", "2", *extra).losses


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("way", [[], CHECKPOINTED, BOUNDED], ids=["plain", "checkpointed", None])
def test_swapped_blocks_change_no_loss_in_a_busy_run(
    way: list[str], family: SmallFamily, images: Path, tmp_path: Path, prompts: list[str]
) -> None:
    """With accumulation, dropout, previews and validation between the steps."""
    busy = [*BUSY, *prompts, *way, "--network_train_unet_only"]
    plain = losses(family, images, tmp_path / "a", *busy)
    assert losses(family, images, tmp_path / "b", *busy, "--blocks_to_swap", "2") == plain
    assert len(list((tmp_path / "b" / "sample").glob("*.png"))) == 2


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    "way",
    [["--cpu_offload_checkpointing"], ["--unsloth_offload_checkpointing", "--blocks_to_swap", "2"]],
    ids=["alone", "with swapped blocks"],
)
@pytest.mark.parametrize("what", [CHECKPOINTED, BOUNDED], ids=["checkpointed", None])
def test_offloaded_checkpoints_change_no_loss(
    way: list[str], what: list[str], family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked: list[bool] = []
    take = Parked.take
    monkeypatch.setattr(Parked, "take", lambda self: parked.append(True) or take(self))
    given = ["--network_train_unet_only", *what]
    plain = losses(family, images, tmp_path / "a", *given)
    assert parked == [] and losses(family, images, tmp_path / "b", *given, *way) == plain and parked != []


@pytest.mark.usefixtures("any_device")
def test_text_encoders_are_trained_beside_swapped_blocks(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    given = ["--gradient_checkpointing"]
    assert losses(family, images, tmp_path / "b", *given, "--blocks_to_swap", "2") == losses(family, images, tmp_path / "a", *given)


def test_checkpointed_text_encoders_stay_in_their_mode_but_for_the_layers_themselves(
    sdxl: SmallFamily, images: Path, tmp_path: Path, runs: list[Run]
) -> None:
    losses(sdxl, images, tmp_path, "--gradient_checkpointing")
    encoders = runs[0].trained.models.text_encoders
    training = [module for encoder in encoders for module in encoder.modules() if module.training]
    assert training and all(getattr(module, "gradient_checkpointing", False) for module in training)


def weights(run: Run) -> set[str]:
    """Where the weights of text encoders and VAE are."""
    models = run.trained.models
    assert models.vae is not None
    return {parameter.device.type for module in (*models.text_encoders, models.vae) for parameter in module.parameters()}


def test_models_that_nothing_needs_any_more_are_freed(family: SmallFamily, images: Path, tmp_path: Path, runs: list[Run]) -> None:
    losses(family, images, tmp_path, *CACHED)
    assert weights(runs[0]) == {"meta"}


def test_models_that_previews_need_stay(family: SmallFamily, images: Path, tmp_path: Path, runs: list[Run], prompts: list[str]) -> None:
    losses(family, images, tmp_path, *CACHED, *prompts, "--sample_every_n_steps", "2")
    assert weights(runs[0]) == {"cpu"} and len(list((tmp_path / "sample").glob("*.png"))) == 1


def test_highvram_keeps_every_model_whole(family: SmallFamily, images: Path, tmp_path: Path, runs: list[Run]) -> None:
    losses(family, images, tmp_path, *CACHED, "--highvram")
    assert weights(runs[0]) == {"cpu"}


class Moves(nn.Module):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    def to(self, *args: Any, **kwargs: Any) -> "Moves":
        self.sent.append(str(args[0]))
        return self


@pytest.mark.parametrize(
    ("extra", "sent"),
    [([], ["cpu"]), (["--lowram"], ["cpu"]), (["--highvram"], []), (["previews"], ["cpu"]), (["previews", "--lowram"], [])],
    ids=lambda words: " ".join(words) if isinstance(words, list) else None,
)
def test_what_is_cached_leaves_the_device_unless_an_option_keeps_it(
    extra: list[str], sent: list[str], sdxl: SmallFamily, images: Path, tmp_path: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    from library.models.architecture import Models
    from library.training import caching

    monkeypatch.setattr(caching, "cache_latents", lambda *args: None)
    monkeypatch.setattr(caching, "cache_text", lambda *args: None)
    words = [*CACHED, *(word for word in extra if word != "previews")]
    options = sdxl.options(images, tmp_path, *words, *([*prompts, "--sample_at_first"] if "previews" in extra else []))
    vae, encoder = Moves(), Moves()
    data: Any = None
    caching.fill_caches(
        sdxl.arch, Models(denoiser=Moves(), text_encoders=[encoder], tokenizers=[], vae=vae), data, options, Accelerator(cpu=True)
    )
    assert vae.sent == encoder.sent == sent


def test_latents_in_tiles_are_not_taken_for_others(
    family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training import caching

    identities: list[str] = []
    fill = caching.fill_latents
    monkeypatch.setattr(caching, "fill_latents", lambda *args, **named: identities.append(named["identity"]) or fill(*args, **named))
    for number, extra in enumerate(([], ["--vae_slicing"], ["--vae_tiling"])):
        losses(family, images, tmp_path / str(number), "--cache_latents", *extra)
    assert identities[0] == identities[1] != identities[2]


def test_slices_change_no_loss_beyond_rounding(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = losses(family, images, tmp_path / "a")
    assert losses(family, images, tmp_path / "b", "--vae_slicing") == pytest.approx(plain, rel=1e-4)


# What is refused, and what is said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--blocks_to_swap", "2"], "--blocks_to_swap: the device cpu has no memory of its own to save"),
        (["--gradient_checkpointing", "--cpu_offload_checkpointing"], "--cpu_offload_checkpointing: the device cpu has no memory"),
        (["--activation_memory_budget", "75%", "--unsloth_offload_checkpointing"], "--unsloth_offload_checkpointing: the device cpu"),
        (["--activation_memory_budget", "much"], "--activation_memory_budget: 'much' is no amount of memory"),
        (["--blocks_to_swap", "-1"], "--blocks_to_swap -1: must not be negative"),
    ],
)
def test_a_mistake_is_answered_with_what_would_work(
    extra: list[str], message: str, family: SmallFamily, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        losses(family, images, tmp_path, *extra)
    assert message in str(caught.value)


@pytest.mark.usefixtures("any_device")
def test_more_blocks_than_there_are_are_refused_before_models_are_loaded(
    family: SmallFamily, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(family.arch), "load", lambda *args, **named: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="--blocks_to_swap 1000: the model has "):
        losses(family, images, tmp_path, "--blocks_to_swap", "1000")


IN_VAIN = {
    "gradient_checkpointing": ["--activation_memory_budget", "75%"],
    "cpu_offload_checkpointing": [],
    "unsloth_offload_checkpointing": [],
    "vae_slicing": ["--cache_latents"],
    "lowram": [],
    "highvram": [],
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_what_is_given_in_vain_is_said(name: str, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    options = family.options(images, tmp_path, f"--{name}", *IN_VAIN[name])
    assert any(sentence.startswith(f"--{name} has no effect: ") for sentence in without_effect(options))


def test_options_that_act_are_not_called_vain(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    given = ["--gradient_checkpointing", "--cpu_offload_checkpointing", "--vae_slicing", "--vae_tiling"]
    drawn = ["--lowram", "--cache_latents", "--vae_batch_size", "2", "--sample_prompts", "a.txt", "--sample_at_first"]
    assert list(without_effect(family.options(images, tmp_path, *given, *drawn))) == []
    assert list(without_effect(family.options(images, tmp_path, *given))) == []


def test_a_family_without_a_row_of_blocks_refuses_what_is_about_them() -> None:
    from library.training.memory.options import MemoryOptions, refuse_without_blocks

    class NoRow:
        has_blocks, title = False, "No Row"

    arch: Any = NoRow()
    with pytest.raises(OptionError) as caught:
        refuse_without_blocks(arch, MemoryOptions(blocks_to_swap=2, activation_memory_budget="6GB"))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["--blocks_to_swap", "--activation_memory_budget"]
    refuse_without_blocks(arch, MemoryOptions(gradient_checkpointing=True))
