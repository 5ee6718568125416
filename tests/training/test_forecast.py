"""What a run will take, told from fakes, against the same run with real tensors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_family import SmallFamily
from torch import Tensor, nn

from library.core.command_line import OptionSet
from library.core.tensor_file import read_header
from library.models.forecast import forecast_of
from library.training.adapters import NetworkOptions, build_trained_network
from library.training.forecast.ledger import Ledger
from library.training.forecast.memory import GPU, MAIN, Forecast, MemoryFacts, forecast_run, largest
from library.training.forecast.modules import file_bytes, file_tensors, module_facts
from library.training.forecast.optimizers import optimizer_states
from library.training.forecast.phases import Shape, state_bytes, step_bytes
from library.training.forecast.stand_in import own_bytes
from library.training.memory.activations import fakes
from library.training.model import TrainingModel
from library.training.optimizing.optimizer import OptimizerOptions, build_optimizer
from networks.network import Network

SHAPE = Shape(width=64, height=64, batch=2)
TOLD: dict[Any, Forecast] = {}


def told(family: SmallFamily, images: Path, folder: Path, *extra: str, **others: Any) -> Forecast:
    """The forecast of a family's run with these options, made once: it takes seconds and does not depend on folders."""
    key = (family.arch.name, extra, tuple(sorted(others.items())))
    if key not in TOLD:
        options = family.options(images, folder, "--network_train_unet_only", *extra)
        TOLD[key] = forecast_run(family.arch, options, [SHAPE], **{"text_is_cached": True, "as_on_gpu": False, **others})
    return TOLD[key]


def sizes(facts: MemoryFacts) -> dict[str, int]:
    return {part.name: part.bytes for part in facts.parts}


def real_parts(family: SmallFamily, options: OptionSet) -> dict[str, int]:
    """The parts of a step that is really made."""
    arch, model_options = family.arch, options[family.arch.ModelOptions]
    models = arch.load(model_options, device=torch.device("cpu"), dtype=torch.float32)
    trained = build_trained_network(models, options[NetworkOptions], options[OptimizerOptions], text_is_cached=True)
    known = forecast_of(arch, model_options)
    assert known is not None
    with torch.no_grad():
        text = arch.encode_text(models.text_encoders, known.tokens(SHAPE.batch))
    model = TrainingModel(arch, models.denoiser, [], trained.network, trains_text_encoders=False)
    step = step_bytes(model, arch, text, SHAPE, trained.parameters)
    optimizer = build_optimizer(trained.groups, options[OptimizerOptions])
    optimizer.step()
    return {"denoiser": own_bytes(models.denoiser), "optimizer": state_bytes(optimizer), "step": step.peak}


@pytest.mark.slow
@pytest.mark.parametrize("module", ["networks.lora", "networks.lokr"])
def test_the_estimate_is_what_a_real_step_takes(module: str, family: SmallFamily, images: Path, tmp_path: Path) -> None:
    options = family.options(images, tmp_path, "--network_train_unet_only", module=module)
    facts = forecast_run(family.arch, options, [SHAPE], text_is_cached=True, as_on_gpu=False).memory
    found, real = sizes(facts), real_parts(family, options)
    assert (found["denoiser"], found["optimizer"]) == (real["denoiser"], real["optimizer"])
    assert found["activations"] + found["gradients"] + found.get("working space", 0) == pytest.approx(real["step"], rel=0.02)


@pytest.mark.slow
def test_checkpointing_keeps_less_and_a_budget_what_lies_between(family: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain, least, half = (
        sizes(told(family, images, tmp_path, *extra).memory)["activations"]
        for extra in ((), ("--gradient_checkpointing",), ("--activation_memory_budget", "80%"))
    )
    assert least < half < plain and least < 0.7 * plain


@pytest.mark.slow
def test_an_average_takes_four_bytes_a_trained_number(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    forecast = told(sdxl, images, tmp_path, "--ema_decay", "0.99")
    assert sizes(forecast.memory)["average"] == 4 * sum(parameter.numel() for parameter in forecast.trained.parameters)


def test_swapped_blocks_wait_in_main_memory(anima: SmallFamily, images: Path, tmp_path: Path) -> None:
    plain = sizes(told(anima, images, tmp_path).memory)
    swapped = told(anima, images, tmp_path, "--blocks_to_swap", "1").memory
    places = {part.name: part.place for part in swapped.parts}
    assert places["swapped blocks"] == MAIN and sizes(swapped)["swapped blocks"] > 0
    assert sizes(swapped)["denoiser"] <= plain["denoiser"]


@pytest.mark.slow
def test_fp8_weights_take_half_of_bf16(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    half = sizes(told(sdxl, images, tmp_path, "--mixed_precision", "bf16").memory)["denoiser"]
    eighth = sizes(told(sdxl, images, tmp_path, "--mixed_precision", "bf16", "--fp8_base").memory)["denoiser"]
    assert 0.5 <= eighth / half < 0.55


@pytest.mark.slow
def test_a_gpu_casts_norms_up_and_keeps_more(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = (
        sizes(told(sdxl, images, tmp_path, "--mixed_precision", "bf16", as_on_gpu=where).memory)["activations"] for where in (False, True)
    )
    assert on_gpu > on_cpu


@pytest.mark.slow
def test_phases_are_those_that_the_options_have(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    def names(*extra: str, **others: Any) -> set[str]:
        return {phase.name for phase in told(sdxl, images, tmp_path, *extra, **others).memory.phases}

    step = {"training step", "optimizer step"}
    assert names() == {*step, "encoding a batch of images"}
    assert names("--cache_latents", "--cache_text_encoder_outputs") == {*step, "caching latents", "caching text"}
    assert names("--cache_latents", drawn=SHAPE) == {*step, "caching latents", "previews"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "drawn", "place"), [((), None, None), ((), SHAPE, MAIN), (("--highvram",), SHAPE, GPU), (("--lowram",), SHAPE, GPU)]
)
def test_a_cached_vae_rests_where_previews_and_options_say(
    extra: tuple[str, ...], drawn: Shape | None, place: str | None, sdxl: SmallFamily, images: Path, tmp_path: Path
) -> None:
    facts = told(sdxl, images, tmp_path, "--cache_latents", *extra, drawn=drawn).memory
    assert {part.name: part.place for part in facts.parts}.get("VAE") == place


@pytest.mark.slow
def test_trained_text_encoders_are_part_of_the_step(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    options = sdxl.options(images, tmp_path)
    trained = forecast_run(sdxl.arch, options, [SHAPE], text_is_cached=False, as_on_gpu=False)
    alone = told(sdxl, images, tmp_path)
    assert sizes(trained.memory)["activations"] > sizes(alone.memory)["activations"]
    assert {each.part for each in module_facts(trained.trained.network)} > {each.part for each in module_facts(alone.trained.network)}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float", "bf16"])
def test_the_files_size_is_known_to_the_byte_but_for_metadata(precision: str, sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    extra = ("--network_train_unet_only", "--max_train_steps", "1", "--save_precision", precision)
    file = sdxl.run(images, tmp_path, *extra).file
    network = told(sdxl, images, tmp_path).trained.network
    dtype = torch.float32 if precision == "float" else torch.bfloat16
    header = read_header(file)
    body = sum(tensor.numel() * (4 if name.endswith(".alpha") else dtype.itemsize) for name, tensor in file_tensors(network).items())
    assert set(header.tensors) == set(file_tensors(network))
    assert body < file_bytes(file_tensors(network), dtype) < file.stat().st_size < file_bytes(file_tensors(network), dtype) + 20_000


def test_modules_list_every_adapter_and_all_parameters(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    network = told(sdxl, images, tmp_path).trained.network
    assert isinstance(network, Network)
    facts = module_facts(network)
    assert [each.name for each in facts] == [adapter.name for adapter in network.adapters]
    assert sum(each.parameters for each in facts) == sum(parameter.numel() for parameter in network.parameters())
    assert all(each.rank == 2 for each in facts)


def test_the_largest_batch_has_the_most_pixels() -> None:
    shapes = [SHAPE, replace(SHAPE, width=96), replace(SHAPE, width=128, batch=1)]
    assert largest(shapes) == shapes[1]


# Optimizers


def groups() -> list[dict[str, Any]]:
    parameter = nn.Parameter(torch.zeros(64, 256))
    parameter.grad = torch.zeros(64, 256)
    return [{"params": [parameter], "lr": 1e-3}]


@pytest.mark.parametrize(("name", "each"), [("AdamW", 8), ("Lion", 4), ("SGD", 0), ("AdamW8bit", 2 + 2 * 4 / 256)])
def test_states_in_bytes_a_parameter(name: str, each: float) -> None:
    with fakes():
        found = optimizer_states(groups(), OptimizerOptions(optimizer_type=name))
    assert (found.bytes, found.paged) == (pytest.approx(each * 64 * 256, abs=8), 0)


@pytest.mark.parametrize(
    ("name", "numbers", "each", "paged"),
    [
        ("AdamW8bit", 4095, 8, 0), ("Lion8bit", 4095, 4, 0), ("AdEMAMix8bit", 4096, 3 * 1.015625, 0),
        ("PagedAdamW8bit", 99_999, 2 * 1.015625, 0), ("PagedAdamW8bit", 102_400, 0, 2 * 1.015625), ("PagedAdamW", 102_400, 0, 8),
    ],
)  # fmt: skip
def test_bitsandbytes_packs_and_pages_what_is_large_enough(name: str, numbers: int, each: float, paged: float) -> None:
    found = optimizer_states([{"params": [nn.Parameter(torch.zeros(numbers))]}], OptimizerOptions(optimizer_type=name))
    assert (found.bytes, found.paged) == (int(each * numbers), int(paged * numbers))


def test_an_optimizer_that_wants_numbers_is_tried_on_a_small_parameter() -> None:
    pytest.importorskip("prodigyopt")
    with fakes():
        found = optimizer_states(groups(), OptimizerOptions(optimizer_type="Prodigy", learning_rate=1.0))
    assert found.bytes >= 16 * 64 * 256 * 0.9


# Networks that need real tensors


@pytest.mark.slow
@pytest.mark.parametrize("extra", [("--dim_from_weights",), ("--network_dim", "2")])
def test_a_network_that_starts_from_a_file_is_told_too(extra: tuple[str, ...], sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    file = sdxl.run(images, tmp_path, "--network_train_unet_only", "--max_train_steps", "1").file
    plain, found = told(sdxl, images, tmp_path), told(sdxl, images, tmp_path, "--network_weights", str(file), *extra)
    assert sizes(found.memory) == sizes(plain.memory)
    assert module_facts(found.trained.network) == module_facts(plain.trained.network)


@pytest.mark.slow
def test_a_third_party_network_that_computes_with_its_shapes_is_told_too(sdxl: SmallFamily, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    options = sdxl.options(images, tmp_path, "--network_args", "algo=lokr", "factor=4", module="lycoris.kohya")
    found = forecast_run(sdxl.arch, options, [SHAPE], text_is_cached=False)
    assert sizes(found.memory)["adapter"] > 0


# The ledger


def test_the_ledger_knows_what_lives_and_the_most_that_did() -> None:
    with Ledger() as ledger:
        first = torch.zeros(100)
        second: Tensor | None = first + 1
        del second
        third = first.view(10, 10)
    assert (ledger.alive, ledger.peak) == (400, 800)
    del first, third
    assert ledger.alive == 0
