"""anima_minimal_inference.py end to end, on a tiny random Anima: every source of prompts, every kind of output."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from minimal_runs import ANIMA, Run, distance, levels
from PIL import Image

from library.core.tensor_file import load_tensors, read_header
from library.inference.minimal.script import main


@pytest.fixture
def run(small_anima_files: Any, tmp_path: Path) -> Run:
    return Run(small_anima_files, tmp_path)


def test_a_picture_holds_the_parameters_that_made_it(run: Run) -> None:
    [path] = run("--prompt", "a red cat --n a dog --w 48 --h 64 --d 7 --g 2 --fs 3 --s 3")
    with Image.open(path) as image:
        assert image.size == (48, 64)
        assert image.info == {
            "prompt": "a red cat", "negative-prompt": "a dog", "seed": "7", "sampler": "euler", "steps": "3", "scale": "2.0",
            "width": "48", "height": "64", "flow-shift": "3.0",
        }  # fmt: skip
    assert path.name.endswith("_7.png")


def test_image_size_is_height_and_width(run: Run) -> None:
    [path] = run("--prompt", "a cat")
    with Image.open(path) as image:
        assert image.size == (32, 48)


def test_without_metadata_nothing_is_written_beside_the_pixels(run: Run) -> None:
    picture, latents = sorted(run("--prompt", "a cat", "--no_metadata", "--output_type", "latent_images"), key=lambda path: path.suffix)
    with Image.open(picture) as image:
        assert image.info == {}
    assert read_header(latents).metadata == {}


def test_a_prompt_is_taken_as_it_is_written(run: Run) -> None:
    prompt = "un gar\u00e7on, \u732b \\n (((x)))"
    [path] = run("--prompt", prompt)
    with Image.open(path) as image:
        assert image.info["prompt"] == prompt


def test_latents_of_a_file_are_those_that_were_drawn(run: Run) -> None:
    latent, picture = run("--prompt", "a cat --n dog", "--output_type", "latent_images")
    header = read_header(latent)
    assert latent.name.endswith("_1_latent.safetensors")
    assert header.tensors["latent"].shape == (1, 16, 1, 6, 4) and header.tensors["latent"].dtype == "F32"
    assert header.metadata == {
        "seeds": "1", "prompt": "a cat", "height": "48", "width": "32", "infer_steps": "2", "guidance_scale": "3.5",
        "negative_prompt": "dog", "flow_shift": "5.0", "sampler": "euler",
    }  # fmt: skip
    [decoded] = run("--latent_path", str(latent))
    assert distance(decoded, picture) == 0
    with Image.open(decoded) as again, Image.open(picture) as first:
        assert again.info == first.info
    assert decoded.name.endswith(f"_1_{latent.stem}.png")


def test_latents_are_decoded_with_the_vae_alone(run: Run) -> None:
    [latent] = run("--prompt", "a cat", "--output_type", "latent")
    [path] = main("anima", ["--vae", str(run.files.vae), "--save_path", str(run.folder), "--latent_path", str(latent)])
    assert path.suffix == ".png"


def test_latents_alone_need_no_vae(run: Run) -> None:
    models = run.models()[:4]
    [path] = main("anima", [*models, "--save_path", str(run.folder), "--prompt", "a --w 32 --h 32 --s 1", "--output_type", "latent"])
    assert load_tensors(path)["latent"].isfinite().all()


def test_a_file_of_prompts_gives_a_picture_a_line_in_their_order(run: Run) -> None:
    lines = run.folder / "prompts.txt"
    lines.write_text("# nothing\na cat --d 3\n\na dog --d 4,5 --w 16 --h 16\n", encoding="utf-8")
    paths = run("--from_file", str(lines))
    assert [path.stem.split("_")[1] for path in paths] == ["3", "4", "5"]
    [alone] = run("--prompt", "a cat --d 3", folder="alone")
    assert distance(paths[0], alone) == 0


def test_pictures_do_not_depend_on_their_batch(run: Run) -> None:
    prompt = ["--prompt", "a cat --n dog --d 1,2,3"]
    alone, together = run(*prompt, folder="a"), run(*prompt, "--batch_size", "3", folder="b")
    assert max(distance(*pair) for pair in zip(alone, together, strict=True)) <= 1
    assert distance(alone[0], alone[1]) > 1


def test_names_are_never_used_twice(run: Run) -> None:
    paths = run("--prompt", "a cat --d 1,1,1,1 --s 1", "--batch_size", "4")
    assert len({path.name for path in paths}) == 4 and all(path.is_file() for path in paths)


def test_split_guidance_draws_the_same_picture(run: Run) -> None:
    [batched], [split] = run("--prompt", "a cat --n dog"), run("--prompt", "a cat --n dog", "--split_guidance")
    assert distance(batched, split) <= 1


def test_guidance_scale_1_reads_no_negative_prompt_and_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    [with_one], [without] = run("--prompt", "a cat --n dog --g 1"), run("--prompt", "a cat --g 1")
    assert torch.equal(levels(with_one), levels(without))
    assert "the negative prompt 'dog' has no effect at guidance scale 1" in capsys.readouterr().err


def test_the_shift_changes_the_picture(run: Run) -> None:
    [five], [one] = run("--prompt", "a cat"), run("--prompt", "a cat --fs 1")
    assert distance(five, one) > 1


def test_rows_at_a_time_decode_the_same_picture(run: Run) -> None:
    [whole], [rows] = run("--prompt", "a cat"), run("--prompt", "a cat", "--vae_chunk_size", "3")
    assert distance(whole, rows) <= 1


def test_fp8_draws_nearly_the_same_picture(run: Run) -> None:
    [full], [fp8] = run("--prompt", "a cat"), run("--prompt", "a cat", "--fp8")
    assert 0 < (levels(full) - levels(fp8)).float().abs().mean() < 40


def test_interactive_draws_until_an_empty_line_and_says_bad_lines(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a cat --d 1\na cat --w ten\na cat --w 33\na dog --d 2\n\na cat --d 3\n"))
    paths = run("--interactive")
    assert [path.stem.split("_")[1] for path in paths] == ["1", "2"]
    said = capsys.readouterr().err
    assert "ERROR   this line, --w: 'ten' is not a whole number" in said
    assert "ERROR   width 33: Anima draws multiples of 16; try 32" in said
    [alone] = run("--prompt", "a dog --d 2", folder="alone")
    assert distance(paths[1], alone) == 0


def test_pictures_drawn_before_an_error_are_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    predict, calls = type(ANIMA).predict, []

    def fails_at_the_second_picture(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of luck")
        return predict(*arguments)

    monkeypatch.setattr(type(ANIMA), "predict", fails_at_the_second_picture)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("--prompt", "a cat --d 1,2,3")
    assert [path.stem.split("_")[1] for path in (run.folder / "out").iterdir()] == ["1"]


def test_files_that_are_broken_or_do_not_fit_are_found_before_loading(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = run.folder / "broken.safetensors"
    broken.write_bytes(run.files.vae.read_bytes()[:5000])
    monkeypatch.setattr("library.inference.minimal.script.Parts", None)
    with pytest.raises(ValueError, match=r"broken.safetensors: truncated"):
        run("--prompt", "a cat", "--vae", str(broken))
    with pytest.raises(ValueError, match=r"vae.safetensors: not .*DiT"):
        run("--prompt", "a cat", "--dit", str(run.files.vae))


@pytest.mark.parametrize(("extra", "message"), [
    ([], "give one of --prompt, --from_file, --interactive and --latent_path"),
    (["--prompt", "a", "--interactive"], "--latent_path, not --prompt and --interactive"),
    (["--prompt", "a", "--image_size", "32", "40"], "width 40: Anima draws multiples of 16; try 32"),
    (["--prompt", "a", "--image_size", "64", "4112"], "width 4112: Anima draws at most 4096"),
    (["--prompt", "a", "--lora_multiplier", "0.5"], "--lora_multiplier has 1 values for 0 --lora_weight"),
    (["--prompt", "a --am 0.5"], "there is no network whose strength it could set"),
    (["--prompt", "a --g 1 --l 2"], "--g and --l are the same; give one"),
    (["--prompt", "a --d -1"], "--d -1: must lie between 0 and 4294967295"),
    (["--prompt", "a", "--fp8_scaled"], "--fp8_scaled: fp8 weights are kept without scales here; use --fp8"),
    (["--prompt", "a", "--device", "cuda:77"], "--device cuda:77: cannot be used here"),
    (["--prompt", "a", "--attn_mode", "tosdpa"], "did you mean 'sdpa'"),
    (["--prompt", "a", "--attn_mode", "xformers"], "--attn_mode xformers: needs the package xformers (pip install xformers)"),
    (["--prompt", "a", "--flow_shift", "0"], "--flow_shift 0: must be more than 0"),
    (["--prompt", "a", "--flow_shift", "inf"], "--flow_shift inf: must be finite"),
    (["--prompt", "a", "--guidance_scale", "inf"], "--guidance_scale inf: must be finite"),
    (["--prompt", "a --fs inf"], "--fs inf: must be finite"),
    (["--prompt", "a --am 1,inf"], "--am inf: must be finite"),
    (["--latent_path", "none.safetensors"], "none.safetensors: no such file"),
    (["--latent_path", "x", "--output_type", "latent"], "--latent_path has the latents already"),
    (["--prompt", "a", "--dit", "none.safetensors"], "--dit none.safetensors: no such file or folder"),
    (["--prompt", "a", "--promt", "b"], "did you mean '--prompt'"),
])  # fmt: skip
def test_a_mistake_is_answered(extra: list[str], message: str, run: Run) -> None:
    with pytest.raises(ValueError) as caught:
        run(*extra)
    assert message in str(caught.value)


@pytest.mark.parametrize(("missing", "message"), [
    ("--dit", "--dit is required: Anima's DiT"),
    ("--text_encoder", "--text_encoder is required: the Qwen3 text encoder"),
    ("--vae", "--vae is required: the Qwen-Image VAE"),
])  # fmt: skip
def test_a_missing_file_is_named_with_what_it_is(missing: str, message: str, run: Run) -> None:
    models = run.models()
    start = models.index(missing)
    with pytest.raises(ValueError, match=message):
        main("anima", [*models[:start], *models[start + 2 :], "--save_path", str(run.folder), "--prompt", "a"])


def test_options_without_effect_are_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    [latent] = run("--prompt", "a cat", "--output_type", "latent", "--no_merge", "--lycoris", "--vae_disable_cache", "--text_encoder_cpu")
    assert without_effect(capsys) == {
        "vae": "nothing is decoded",
        "no_merge": "there is no --lora_weight",
        "lycoris": "what an adapter file holds is found out by itself",
        "vae_disable_cache": "a VAE of single pictures has nothing to keep",
        "text_encoder_cpu": "everything runs on the CPU",
    }
    run("--latent_path", str(latent), "--seed", "1", "--fp8")
    assert set(without_effect(capsys)) == {"dit", "text_encoder", "seed", "fp8"}


def without_effect(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The options that were said to have no effect, with the reason."""
    return dict(re.findall(r"--(\w+) has no effect: (.*)", capsys.readouterr().err))
