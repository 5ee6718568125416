"""The fused backward pass does what stepping afterwards does, and refuses what it cannot."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from optimizer_cases import CPU_OPTIMIZERS, options_of
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import networks
from library.training.optimizing.fused_backward import fuse_backward
from library.training.optimizing.optimizer import build_optimizer

JOINT = ("Prodigy", "DAdapt", "ScheduleFree")
ALONE = [name for name in CPU_OPTIMIZERS if not any(part in name for part in JOINT)]


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": parameters[::2], "lr": 1e-2}, {"params": parameters[1::2], "lr": 1e-3}]


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(step))
    for layer in model.children():
        y = checkpoint(layer, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        x = y.tanh()
    return x.square().sum()


def train(model: nn.Module, optimizer: Optimizer, *, fused: bool, max_norm: float = 0.0, steps: int = 4) -> None:
    if fused:
        fuse_backward(optimizer, max_norm)
    for step in range(steps):
        loss_of(model, step).backward()
        if not fused:
            for parameter in model.parameters():
                if max_norm and parameter.grad is not None:
                    nn.utils.clip_grad_norm_([parameter], max_norm)
            optimizer.step()
            optimizer.zero_grad()


def both_ways(model: nn.Module, name: str, max_norm: float = 0.0) -> list[dict[str, Tensor]]:
    ends = []
    for fused in (False, True):
        own = copy.deepcopy(model)
        train(own, build_optimizer(groups_of(own), options_of(name), seed=1), fused=fused, max_norm=max_norm)
        ends.append(own.state_dict())
    return ends


def layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


@pytest.mark.parametrize("name", ALONE)
def test_every_optimizer_that_can_steps_alike(name: str) -> None:
    after, during = both_ways(layers(), name)
    assert all(torch.equal(tensor, during[key]) for key, tensor in after.items())
    assert not torch.equal(after["0.weight"], layers().state_dict()["0.weight"])


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_clipping_acts_on_each_tensor_alone(name: str) -> None:
    after, during = both_ways(layers(), name, max_norm=0.01)
    assert all(torch.equal(tensor, during[key]) for key, tensor in after.items())


def adapted(algorithm: str, *, dora: bool) -> tuple[nn.Module, nn.Module]:
    """Two frozen layers, and the network on them: adapters that do something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    adapters = networks.create_network(model, algorithm, rank=2, target_modules=["0", "1"], dora_wd=dora)
    adapters.attach()
    for parameter in adapters.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, adapters


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_checkpointed_layers_step_alike(algorithm: str, dora: bool) -> None:
    ends = []
    for fused in (False, True):
        model, adapters = adapted(algorithm, dora=dora)
        train(model, build_optimizer(groups_of(adapters), options_of("AdamW")), fused=fused)
        ends.append(adapters.state_dict())
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


def test_bfloat16_weights_are_stepped_in_the_backward_pass_too() -> None:
    model = layers(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(groups_of(model), options_of("AdamW"), seed=1)
    fuse_backward(optimizer, 0.0)
    model(torch.ones(1, 8, dtype=torch.bfloat16)).square().sum().backward()
    moved = {key: (tensor.float() - before[key].float()).abs().mean().item() for key, tensor in model.state_dict().items()}
    rates = {key: 1e-2 if index % 2 == 0 else 1e-3 for index, key in enumerate(moved)}
    assert moved == pytest.approx(rates, rel=0.3)  # the first step of AdamW is the rate itself


def test_no_gradient_outlives_the_backward_pass_and_the_state_is_an_ordinary_one() -> None:
    model = layers()
    optimizer = build_optimizer(groups_of(model), options_of("AdamW"))
    groups = [list(group["params"]) for group in optimizer.param_groups]
    train(model, optimizer, fused=True, steps=2)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [group["params"] for group in optimizer.param_groups] == groups
    ordinary = layers()
    same = build_optimizer(groups_of(ordinary), options_of("AdamW"))
    train(ordinary, same, fused=False, steps=2)
    states = [optimizer.state_dict()["state"], same.state_dict()["state"]]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key]["exp_avg"], state["exp_avg"]) for key, state in states[1].items())


def test_accelerates_wrapper_is_seen_through() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    model, plain = layers(), layers()
    prepared, optimizer = Accelerator(cpu=True).prepare(model, build_optimizer(groups_of(model), options_of("AdamW")))
    train(prepared, optimizer, fused=True)
    train(plain, build_optimizer(groups_of(plain), options_of("AdamW")), fused=False)
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", [name for name in CPU_OPTIMIZERS if name not in ALONE])
def test_an_optimizer_that_looks_at_all_weights_is_refused(name: str) -> None:
    (problem,) = options_of(name, fused_backward_pass=True).check()
    assert problem.startswith("--fused_backward_pass: ") and "steps one weight by what all of them did" in problem


@pytest.mark.parametrize("name", ALONE)
def test_an_optimizer_that_looks_at_one_weight_is_not(name: str) -> None:
    assert list(options_of(name, fused_backward_pass=True).check()) == []
