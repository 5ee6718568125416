"""Adapter files on the minimal script: of every algorithm, several at once, merged or beside the weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from minimal_runs import ANIMA, Run, distance, write_adapter
from PIL import Image

from library.core.tensor_file import load_tensors, save_tensors
from library.inference.minimal.adapters import merge_for_good, read_networks
from library.inference.minimal.options import AdapterOptions
from library.models.architecture import Models
from networks.export import WRITERS, export, write_export
from networks.network import Network

PROMPT = ("--prompt", "a cat --n dog")


@pytest.fixture
def run(small_anima_files: Any, tmp_path: Path) -> Run:
    return Run(small_anima_files, tmp_path)


@pytest.fixture(scope="module")
def adapters(small_anima_files: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each algorithm, and one with LoHa in the denoiser and LoKr in the text encoder."""
    folder = tmp_path_factory.mktemp("adapters")
    files = {name: write_adapter(small_anima_files, folder / f"{name}.safetensors", name) for name in ("lora", "loha", "lokr")}
    loha, lokr = load_tensors(files["loha"]), load_tensors(files["lokr"])
    mixed = {name: tensor for name, tensor in loha.items() if name.startswith("lora_unet_")}
    mixed |= {name: tensor for name, tensor in lokr.items() if name.startswith("lora_te_")}
    save_tensors(folder / "mixed.safetensors", mixed)
    return {**files, "mixed": folder / "mixed.safetensors"}


@pytest.fixture
def models(small_anima_files: Any) -> Models:
    files = small_anima_files
    options = ANIMA.ModelOptions(pretrained_model_name_or_path=str(files.dit), qwen3=str(files.qwen3), vae=str(files.vae))
    return ANIMA.load(options, device=torch.device("cpu"), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "mixed"])
def test_a_file_of_any_algorithm_is_merged_as_it_would_be_applied(name: str, run: Run, adapters: dict[str, Path]) -> None:
    extra = (*PROMPT, "--lora_weight", str(adapters[name]))
    [base], [merged], [applied] = run(*PROMPT), run(*extra), run(*extra, "--no_merge")
    assert distance(merged, applied) <= 1 < distance(base, merged)


def test_strengths_are_one_a_file_and_1_where_absent(run: Run, adapters: dict[str, Path]) -> None:
    files = ("--lora_weight", str(adapters["lora"]), str(adapters["lokr"]))
    [both], [explicit] = run(*PROMPT, *files, "--lora_multiplier", "0.5"), run(*PROMPT, *files, "--lora_multiplier", "0.5", "1")
    [other] = run(*PROMPT, *files)
    assert distance(both, explicit) == 0 < distance(both, other)


def test_the_text_encoders_adapters_act(run: Run, adapters: dict[str, Path]) -> None:
    extra = ("--lora_weight", str(adapters["loha"]))
    [whole], [denoiser] = run(*PROMPT, *extra), run(*PROMPT, *extra, "--include_patterns", r"blocks\..*")
    assert distance(whole, denoiser) > 1


def test_patterns_choose_layers_by_their_original_names(run: Run, adapters: dict[str, Path]) -> None:
    extra = (*PROMPT, "--lora_weight", str(adapters["lora"]))
    included = run(*extra, "--include_patterns", r"blocks\.0\..*", r"blocks\.1\..*", "--exclude_patterns", r".*\.mlp\..*")
    excluded = run(*extra, "--exclude_patterns", r"layers\..*", r".*\.mlp\..*")
    assert distance(included[0], excluded[0]) == 0


@pytest.mark.parametrize(("patterns", "message"), [
    (["--include_patterns", "bloks.*"], "leave nothing of it; its layers have names such as blocks.0.self_attn.q_proj"),
    (["--exclude_patterns", "bloks.*"], "--exclude_patterns 'bloks.*': matches no layer of the adapter files, whose names are like"),
    (["--exclude_patterns", "(blocks"], "--exclude_patterns '(blocks': not a regular expression"),
])  # fmt: skip
def test_patterns_that_choose_nothing_are_named(patterns: list[str], message: str, run: Run, adapters: dict[str, Path]) -> None:
    with pytest.raises(ValueError) as caught:
        run(*PROMPT, "--lora_weight", str(adapters["lora"]), *patterns)
    assert message in str(caught.value)


def test_strengths_change_from_line_to_line_without_merging(run: Run, adapters: dict[str, Path]) -> None:
    lines = run.folder / "lines.txt"
    lines.write_text("a cat --am 0\na cat --am 1\na cat --am 0.5\n")
    off, full, half = run("--from_file", str(lines), "--lora_weight", str(adapters["loha"]), "--no_merge", "--batch_size", "3")
    [base], [merged] = run("--prompt", "a cat"), run("--prompt", "a cat", "--lora_weight", str(adapters["loha"]))
    assert distance(off, base) == 0
    assert distance(full, merged) <= 1
    assert min(distance(half, off), distance(half, full)) > 1


def test_a_merged_strength_is_fixed(run: Run, adapters: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"--am in 'a cat': merged adapters have a fixed strength; give --no_merge"):
        run("--prompt", "a cat --am 0.5", "--lora_weight", str(adapters["lora"]))


def test_several_networks_are_rounded_once(models: Models, adapters: dict[str, Path]) -> None:
    options = AdapterOptions(
        lora_weight=(str(adapters["lora"]), str(adapters["loha"]), str(adapters["lokr"])), lora_multiplier=(0.01, 0.02)
    )
    networks = read_networks(options, models.denoiser, models.text_encoders)
    exact = {}
    for network in networks:
        for adapter in network.adapters:
            start = exact.get(adapter.layer, adapter.layer.weight.float())
            exact[adapter.layer] = start + adapter.multiplier * adapter.delta_weight().float()
    merge_for_good(networks)
    for layer, weight in exact.items():
        torch.testing.assert_close(layer.weight, weight.to(torch.bfloat16), rtol=2**-8, atol=1e-6)
        assert (layer.weight != weight.to(torch.bfloat16)).float().mean() < 0.01  # a second rounding would move many


def test_merging_keeps_no_copy_of_the_weights(models: Models, adapters: dict[str, Path]) -> None:
    options = AdapterOptions(lora_weight=(str(adapters["lora"]), str(adapters["lora"])))
    networks = read_networks(options, models.denoiser, models.text_encoders)
    merge_for_good(networks)
    with pytest.raises(ValueError, match="merged without a kept copy"):
        networks[0].unmerge()


def test_fp8_weights_are_those_of_the_merged_model(run: Run, adapters: dict[str, Path]) -> None:
    extra = (*PROMPT, "--lora_weight", str(adapters["lora"]), "--fp8")
    [merged], [base] = run(*extra), run(*PROMPT, "--fp8")
    assert distance(merged, base) > 1


def test_an_adapter_of_another_family_is_refused_by_name(run: Run) -> None:
    foreign = run.folder / "sdxl.safetensors"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    save_tensors(foreign, {f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)})
    with pytest.raises(ValueError, match=r"(?s)sdxl.safetensors.*SDXL"):
        run(*PROMPT, "--lora_weight", str(foreign))


def test_what_fits_of_a_file_is_used_where_that_is_allowed(run: Run, adapters: dict[str, Path]) -> None:
    partly = run.folder / "partly.safetensors"
    save_tensors(partly, load_tensors(adapters["lora"]) | {"lora_unet_no_such_layer.lora_down.weight": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match="lora_unet_no_such_layer"):
        run(*PROMPT, "--lora_weight", str(partly))
    [some], [whole] = run(*PROMPT, "--lora_weight", str(partly), "--allow_partial"), run(*PROMPT, "--lora_weight", str(adapters["lora"]))
    assert distance(some, whole) == 0


def test_a_picture_names_the_adapters_that_made_it(run: Run, adapters: dict[str, Path]) -> None:
    [path] = run(*PROMPT, "--lora_weight", str(adapters["lora"]), "--lora_multiplier", "0.5")
    with Image.open(path) as image:
        assert image.info["networks"] == "lora.safetensors:0.5"


@pytest.mark.parametrize("target", ["comfyui", "diffusers", "peft"])
def test_files_of_other_tools_draw_the_same_picture(target: str, run: Run, models: Models, tmp_path: Path) -> None:
    ours = write_adapter(run.files, tmp_path / "ours.safetensors", "lora", with_text=target != "diffusers")
    theirs = tmp_path / f"theirs{WRITERS[target].suffix}"
    write_export(theirs, export(Network.from_file(ours, models.denoiser, models.text_encoders), target))
    [first], [second] = run(*PROMPT, "--lora_weight", str(ours)), run(*PROMPT, "--lora_weight", str(theirs))
    assert distance(first, second) <= 1
