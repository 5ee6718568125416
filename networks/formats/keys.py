"""How tools spell the tensors of a layer: every key of a file as the layer's name and our name of the parameter."""

from collections.abc import Iterable
from dataclasses import dataclass, field

MAGNITUDE = "magnitude"  # DoRA's magnitudes as PEFT writes them: of the outputs, in whatever shape
ANY = "*"  # PEFT's name of the adapter: lora_A.default.weight

FACTORS = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
)
SIDES = {"down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight"}
ENDS: dict[tuple[str, ...], str] = {  # the last words of a key -> our name of the parameter
    **{(f"lora_{side}", "weight"): name for side, name in SIDES.items()},  # kohya, LyCORIS
    **{("lora", side, "weight"): name for side, name in SIDES.items()},  # diffusers before PEFT
    **{("lora_linear_layer", side, "weight"): name for side, name in SIDES.items()},
    **{(letter, *adapter, "weight"): SIDES[side] for letter, side in (("lora_A", "down"), ("lora_B", "up")) for adapter in ((), (ANY,))},
    **{("lora_B", *adapter, "bias"): "lora_B.bias" for adapter in ((), (ANY,))},
    **{("lora_magnitude_vector", *rest): MAGNITUDE for rest in ((), (ANY,), (ANY, "weight"))},
    **{(factor, *adapter): factor for factor in FACTORS for adapter in ((), (ANY,))},
    **{(name,): name for name in ("alpha", "dora_scale", "scalar", "diff", "diff_b", "w_norm", "b_norm")},
    ("magnitude",): MAGNITUDE,
}
FLAT = ("lora_", "lycoris_")  # names that begin like this hold no dots


@dataclass
class Layers:
    """The tensors of a file by layer: for each layer's name in the file, the key of each parameter."""

    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)  # keys that name no parameter
    twice: list[str] = field(default_factory=list)  # keys of a parameter that the layer has already


def by_name(keys: Iterable[str]) -> Layers:
    """The keys of a file by the names that it gives to layers."""
    layers = Layers()
    for key in keys:
        name, parameter = split_key(key)
        if not name:
            layers.bare.append(key)
        elif parameter in layers.keys.setdefault(name, {}):
            layers.twice.append(key)
        else:
            layers.keys[name][parameter] = key
    return layers


def split_key(key: str) -> tuple[str, str]:
    """The layer's name and our name of the parameter; what is no known parameter keeps its own. The name is empty for a lone word."""
    words = key.split(".")
    for count in range(min(3, len(words) - 1), 0, -1):
        end = tuple(words[-count:])
        masked = (end[0], ANY, *end[2:]) if count > 1 else end
        if end in ENDS or masked in ENDS:
            return _layer(words[:-count]), ENDS.get(end) or ENDS[masked]
    if len(words) > 3 and words[-3].endswith("_lora") and words[-1] == "weight" and words[-2] in SIDES:
        return _layer(words[:-2]), SIDES[words[-2]]
    cut = 1 if words[0].startswith(FLAT) else -1
    return ".".join(words[:cut]), ".".join(words[cut:])


def _layer(words: list[str]) -> str:
    """The name of a layer, where diffusers named it after the attention processor that held its LoRA."""
    words = [word for word in words if word != "processor"]
    if words and words[-1].endswith("_lora"):
        words[-1] = words[-1].removesuffix("_lora")
    return ".".join([*words, "0"] if words and words[-1] == "to_out" else words)
