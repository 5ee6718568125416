"""Merging into a checkpoint takes memory for a tensor or two, not for the checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.core.tensor_stream import Entry, write_stream
from library.models.naming import naming_named
from library.models.sdxl.components import build_text_1, build_text_2, build_unet

ROOT = Path(__file__).parents[2]
UNET = {
    "block_out_channels": (64, 128, 256), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 4), "attention_head_dim": (1, 2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 192, "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 128 + 6 * 256,
}  # fmt: skip
TEXT = {"vocab_size": 5000, "num_hidden_layers": 2, "max_position_embeddings": 77}
SCRIPT = """
import sys
from pathlib import Path
import torch
from library.models.naming import naming_named
from networks import lokr
from networks.checkpoint_merge import Merge, merge_into

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
naming, base, out = naming_named("sdxl"), Path(sys.argv[1]), Path(sys.argv[2])
parts = naming.outline(base)
network = lokr.create_network(1.0, 4, 1.0, None, [module for _, module in parts[1:]], parts[0][1], factor=8, conv_dim=4)
with torch.no_grad():
    for parameter in network.parameters():
        parameter.normal_(std=0.05)
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = kib("VmRSS")
merge_into(base, out, naming, parts, [Merge(members=network.members, strength=0.5)])
print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a part of a run")
def test_peak_memory_is_a_small_part_of_the_checkpoint(tmp_path: Path):
    base, out = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    naming = naming_named("sdxl")
    modules = (
        build_unet(UNET),
        build_text_1(TEXT | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}),
        build_text_2(TEXT | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "projection_dim": 128}),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    for part, module in zip(naming.parts, modules, strict=True):
        state = module.state_dict()
        for name, place in naming.places(part, module).items():
            shape = tuple(state[name].shape)
            is_third = "in_proj" in place.key
            shapes[place.key] = (3 * shape[0], *shape[1:]) if is_third else shape[::-1] if place.key.endswith("text_projection") else shape
    entries = [Entry(key, torch.float16, shape) for key, shape in shapes.items()]
    size = write_stream(base, entries, (torch.randn(entry.shape).half() for entry in entries)).size
    assert size > 90e6
    command = [sys.executable, "-c", SCRIPT, str(base), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size == size
    assert int(done.stdout) < 0.5 * size
