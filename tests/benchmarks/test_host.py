"""The benchmark of host cost."""

from benchmarks.host import HEADER, SETTINGS, SWAP, costs, lines
from benchmarks.peers import OURS
from benchmarks.results import FROZEN
from benchmarks.shapes import PRECISIONS


def test_every_setting_is_measured_beside_the_swap():
    found = list(costs(PRECISIONS["float32"], turns=1))
    assert [(cost.setting, cost.way) for cost in found] == [
        ("", FROZEN),
        *((setting.title, way) for setting in SETTINGS for way in (OURS, SWAP)),
    ]
    assert all(len(line) == len(HEADER) for line in lines(found))


def test_a_lora_launches_fewer_kernels_than_the_swap():
    kernels = {(cost.setting, cost.way): cost.kernels for cost in costs(PRECISIONS["float32"], turns=1)}
    assert kernels["", FROZEN] == 2  # a product forward, a product backward
    assert kernels["LoRA r4", OURS] < kernels["LoRA r4", SWAP]
