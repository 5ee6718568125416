"""gen_img.py end to end, on a tiny random SDXL."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from library.core.devices import best_device
from library.core.tensor_file import save_tensors
from library.inference.images import picture_path
from library.inference.script import main
from library.models.architecture import architecture_named
from networks.loha import create_network

SDXL = architecture_named("sdxl")


@pytest.fixture(scope="module")
def adapter(small_sdxl_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoHa with a large random delta."""
    options = SDXL.ModelOptions(pretrained_model_name_or_path=str(small_sdxl_file))
    models = SDXL.load(options, device=torch.device("cpu"), dtype=torch.float32)
    network = create_network(1.0, 2, 2.0, models.vae, models.text_encoders, models.denoiser)
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("adapter") / "loha.safetensors"
    network.save_weights(path)
    return path


def draw(model: Path, folder: Path, *extra: str) -> list[Path]:
    return main("sdxl", ["--ckpt", str(model), "--outdir", str(folder), "--W", "64", "--H", "64", "--steps", "3", "--seed", "1", *extra])


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def with_network(adapter: Path, *extra: str) -> list[str]:
    return ["--network_module", "networks.loha", "--network_weights", str(adapter), *extra]


def test_a_picture_holds_the_parameters_that_made_it(small_sdxl_file: Path, adapter: Path, tmp_path: Path) -> None:
    extra = with_network(adapter, "--network_mul", "0.5", "--prompt", "a red cat --n a dog --d 7 --l 2")
    [path] = draw(small_sdxl_file, tmp_path, *extra)
    with Image.open(path) as image:
        assert image.size == (64, 64)
        assert image.info == {
            "prompt": "a red cat", "negative-prompt": "a dog", "seed": "7", "sampler": "ddim", "steps": "3", "scale": "2.0",
            "width": "64", "height": "64", "networks": "loha.safetensors:0.5",
        }  # fmt: skip
    assert path.name.startswith("im_") and path.name.endswith("_7.png")


def test_a_picture_never_takes_the_place_of_another(tmp_path: Path) -> None:
    for _ in range(3):
        picture_path(tmp_path, 0, 7, sequential=False).touch()
    assert len(list(tmp_path.glob("im_*_000_7*.png"))) == 3


def test_a_picture_does_not_depend_on_its_batch(small_sdxl_file: Path, tmp_path: Path) -> None:
    extra = ["--prompt", "a cat --d 3,4,5", "--sequential_file_name", "--sampler", "euler_a"]
    alone = draw(small_sdxl_file, tmp_path / "a", *extra)
    together = draw(small_sdxl_file, tmp_path / "b", *extra, "--batch_size", "3")
    for first, second in zip(alone, together, strict=True):
        a, b = (torch.frombuffer(bytearray(pixels(path)), dtype=torch.uint8).int() for path in (first, second))
        assert (a - b).abs().max() <= 1
    assert pixels(alone[0]) != pixels(alone[1])


def test_strength_zero_is_the_base_and_strengths_differ(small_sdxl_file: Path, adapter: Path, tmp_path: Path) -> None:
    [base] = draw(small_sdxl_file, tmp_path / "base", "--prompt", "a cat")
    off, half, full = (
        pixels(draw(small_sdxl_file, tmp_path / mul, "--prompt", "a cat", *with_network(adapter, "--network_mul", mul))[0])
        for mul in ("0", "0.5", "1")
    )
    assert off == pixels(base) and len({off, half, full}) == 3


def test_merged_equals_applied(small_sdxl_file: Path, adapter: Path, tmp_path: Path) -> None:
    extra = ["--prompt", "a cat", *with_network(adapter)]
    applied, merged = draw(small_sdxl_file, tmp_path / "a", *extra), draw(small_sdxl_file, tmp_path / "b", *extra, "--network_merge")
    a, b = (torch.frombuffer(bytearray(pixels(path)), dtype=torch.uint8).int() for path in (applied[0], merged[0]))
    assert (a - b).abs().max() <= 1


def test_two_networks_add_up(small_sdxl_file: Path, adapter: Path, tmp_path: Path) -> None:
    twice = ["--network_module", "networks.loha", "--network_weights", str(adapter), str(adapter), "--network_mul", "0.5", "0.5"]
    [both] = draw(small_sdxl_file, tmp_path / "a", "--prompt", "a cat", *twice)
    [one] = draw(small_sdxl_file, tmp_path / "b", "--prompt", "a cat", *with_network(adapter))
    a, b = (torch.frombuffer(bytearray(pixels(path)), dtype=torch.uint8).int() for path in (both, one))
    assert (a - b).abs().max() <= 1


def test_strengths_change_from_line_to_line(small_sdxl_file: Path, adapter: Path, tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat --d 1 --am 0\na cat --d 1 --am 1\n")
    first, second = draw(small_sdxl_file, tmp_path / "a", "--from_file", str(lines), *with_network(adapter))
    [base] = draw(small_sdxl_file, tmp_path / "b", "--prompt", "a cat --d 1")
    assert pixels(first) == pixels(base) != pixels(second)


def test_bf16_draws(small_sdxl_file: Path, adapter: Path, tmp_path: Path) -> None:
    assert len(draw(small_sdxl_file, tmp_path, "--prompt", "a cat", "--bf16", *with_network(adapter))) == 1


@pytest.mark.skipif(best_device().type != "cpu", reason="a GPU can run fp16")
def test_fp16_on_a_cpu_is_refused(small_sdxl_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--fp16: a CPU cannot"):
        draw(small_sdxl_file, tmp_path, "--prompt", "a cat", "--fp16")


def test_an_adapter_of_another_family_is_refused_by_name(small_sdxl_file: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "anima.safetensors"
    name = "lora_unet_blocks_0_self_attn_q_proj"
    save_tensors(foreign, {f"{name}.lora_down.weight": torch.zeros(2, 8), f"{name}.lora_up.weight": torch.zeros(8, 2)})
    with pytest.raises(ValueError, match="(?s)anima.safetensors.*Anima"):
        draw(small_sdxl_file, tmp_path, "--prompt", "a cat", "--network_module", "networks.lora", "--network_weights", str(foreign))


@pytest.mark.parametrize(("extra", "message"), [
    ([], "give either --prompt or --from_file"),
    (["--prompt", "a cat", "--W", "50"], "width 50: SDXL draws multiples of 32; try 64"),
    (["--prompt", "a cat", "--sampler", "eular"], "did you mean 'euler'"),
    (["--prompt", "a cat", "--network_mul", "1"], "--network_mul has 1 values for 0 --network_weights"),
    (["--prompt", "a cat", "--clip_skip", "2"], "SDXL always reads the penultimate layer"),
    (["--prompt", "a cat", "--ckpt", "none.safetensors"], "none.safetensors"),
])  # fmt: skip
def test_a_mistake_is_answered(extra: list[str], message: str, small_sdxl_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        draw(small_sdxl_file, tmp_path, *extra)
    assert message in str(caught.value)


def test_a_truncated_checkpoint_is_refused_by_name(small_sdxl_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(small_sdxl_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="broken.safetensors: truncated"):
        draw(broken, tmp_path, "--prompt", "a cat")


def test_an_adapter_in_place_of_a_checkpoint_says_so(small_sdxl_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"(?s)lora.safetensors.*(adapter|LoRA)"):
        draw(path, tmp_path, "--prompt", "a cat")


def test_a_checkpoint_in_place_of_an_adapter_says_so(small_sdxl_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"small.safetensors: not an adapter that can be read: it holds tensors such as"):
        draw(small_sdxl_file, tmp_path, "--prompt", "a cat", *with_network(small_sdxl_file))
