"""SDXL's U-Net in the original's class tree, as sd-scripts' own class has it: recognised by structure, the same names in place."""

from types import SimpleNamespace

import pytest
from torch import nn

from library.models.naming import Target, naming_of
from library.models.sdxl.names import NAMING, UNET

WIDTHS, DEPTHS = (32, 64, 64), (0, 1, 2)  # of the small SDXL of the tests
TIME, TEXT, POOLED = 128, 192, 128


class Res(nn.Module):
    """A residual block."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inside), nn.SiLU(), nn.Conv2d(inside, out, 3))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(TIME, out))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3))
        self.skip_connection = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1)


class Attention(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(side, width, bias=False) for side in (width, context, context))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width)
        self.ff = nn.ModuleDict({"net": nn.ModuleList([Gate(width), nn.Identity(), nn.Linear(4 * width, width)])})
        self.attn2 = Attention(width, TEXT)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))


class Attended(nn.Module):
    """A row of transformer blocks between two projections."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(Layer(width) for _ in range(depth))


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3)


class Original(nn.Module):
    """The tree of the original with one layer a level; `first` attends at the first level, as SD 1 does."""

    def __init__(self, first: int = 0, has_sizes: bool = True) -> None:
        super().__init__()
        depths = (first, *DEPTHS[1:])
        self.time_embed = nn.Sequential(nn.Linear(WIDTHS[0], TIME), nn.SiLU(), nn.Linear(TIME, TIME))
        if has_sizes:
            self.label_emb = nn.Sequential(nn.Sequential(nn.Linear(POOLED + 6 * 256, TIME), nn.SiLU(), nn.Linear(TIME, TIME)))
        rows, skips, width = [nn.ModuleList([nn.Conv2d(4, WIDTHS[0], 3)])], [WIDTHS[0]], WIDTHS[0]
        for level, (out, depth) in enumerate(zip(WIDTHS, depths, strict=True)):
            rows.append(nn.ModuleList([Res(width, out), *([Attended(out, depth)] if depth else [])]))
            skips.append(width := out)
            if level < 2:
                rows.append(nn.ModuleList([Down(out)]))
                skips.append(out)
        self.input_blocks = nn.ModuleList(rows)
        self.middle_block = nn.ModuleList([Res(width, width), Attended(width, depths[-1]), Res(width, width)])
        rows = []
        for level, (out, depth) in reversed(list(enumerate(zip(WIDTHS, depths, strict=True)))):
            for last in (False, True):
                row = [Res(width + skips.pop(), out), *([Attended(out, depth)] if depth else [])]
                rows.append(nn.ModuleList([*row, *([Up(out)] if last and level else [])]))
                width = out
        self.output_blocks = nn.ModuleList(rows)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 4, 3))


def rows(targets: list[Target], module: nn.Module) -> list[tuple]:
    """All that must agree between two trees, with the shape of each layer's weight."""
    return [
        (t.name, t.path, t.group, t.container, t.diffusers_path, module.get_parameter(f"{t.module_path}.weight").shape) for t in targets
    ]


def test_both_trees_have_the_same_names_in_the_same_order(small_sdxl_modules: SimpleNamespace):
    unet, original = small_sdxl_modules.unet, Original()
    for table in (NAMING.targets, NAMING.outside):
        own, library = table(UNET, original), table(UNET, unet)
        assert rows(own, original) == rows(library, unet)
        assert all(target.path == target.module_path for target in own)
        assert all(target.diffusers_path == f"unet.{target.module_path}" for target in library)


def test_targets_and_the_layers_outside_the_table_are_all_layers_with_a_weight(small_sdxl_modules: SimpleNamespace):
    for module in (small_sdxl_modules.unet, Original()):
        found = [*NAMING.targets(UNET, module), *NAMING.outside(UNET, module)]
        assert len(found) == len({target.name for target in found})
        assert {target.module_path for target in found} == {path for path, layer in module.named_modules() if hasattr(layer, "weight")}


def test_the_original_tree_is_recognised_by_its_structure():
    naming = naming_of(Original())
    assert naming is not None and naming.name == "sdxl"


@pytest.mark.parametrize(
    "other", [Original(has_sizes=False), Original(first=1), nn.Linear(2, 2)], ids=["no sizes", "attends first", "no U-Net"]
)
def test_stable_diffusion_1_is_not_taken_for_sdxl(other: nn.Module):
    assert not NAMING.recognises(other)


def test_a_library_u_net_without_sizes_is_not_taken_for_sdxl(small_sdxl_modules: SimpleNamespace):
    from diffusers import UNet2DConditionModel

    kept = {key: value for key, value in small_sdxl_modules.unet.config.items() if not key.startswith(("_", "addition_", "projection_"))}
    assert not NAMING.recognises(UNet2DConditionModel(**kept))
    assert NAMING.recognises(small_sdxl_modules.unet)
