"""Blocks of real denoisers with adapters on all their layers, to be compiled; and a compiler that counts what it compiles."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from adapter_cases import filled
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from networks import loha, lokr, lora
from networks.network import Network

MODULES: dict[str, Any] = {"LoRA": lora, "LoHa": loha, "LoKr": lokr}
TEXT_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a denoiser, and random inputs for it by the height and width of its latents."""

    denoiser: Callable[[SimpleNamespace, SimpleNamespace], nn.Module]  # of the small SDXL's or the small Anima's modules
    path: str  # where in the denoiser the block is; empty for the whole
    inputs: Callable[[nn.Module, int, int], dict[str, Any]]


@dataclass(kw_only=True)
class Adapted:
    """A block with an attached network whose parameters are all other than zero."""

    block: nn.Module
    network: Network
    inputs: Callable[[int, int], dict[str, Any]]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained in the block."""
        inside = set(self.block.modules())
        return [parameter for adapter in self.network.adapters if adapter.layer in inside for parameter in adapter.parameters()]


def adapted(block: Block, algorithm: str, sdxl: SimpleNamespace, anima: SimpleNamespace, **arguments: Any) -> Adapted:
    """A block of a copy of its denoiser, which a network of this algorithm is attached to."""
    denoiser = copy.deepcopy(block.denoiser(sdxl, anima)).requires_grad_(False)
    if block.denoiser is _unet:
        arguments.setdefault("conv_dim", 2)
    network = MODULES[algorithm].create_network(1.0, 2, 1.0, None, [], denoiser, **arguments)
    for adapter in network.adapters:
        filled(adapter, 0.1)
    network.attach()
    module = denoiser.get_submodule(block.path)
    return Adapted(block=module, network=network, inputs=lambda height, width: block.inputs(denoiser, height, width))


def counting(
    module: Callable[..., Any], backend: str = "aot_eager", **options: Any
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    """A module or function compiled as one graph, and the count of the graphs that were compiled."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True, **options), counter


def step(call: Callable[..., Any], inputs: dict[str, Any], parameters: list[nn.Parameter], *, is_autocast: bool = False) -> list[Tensor]:
    """The output of a block, and the gradients of all its inputs and parameters, drawn from the same seed in every call."""
    torch.manual_seed(0)
    leaves = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        output = call(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output.float() * weights).sum(), [*leaves, *parameters])]


def random(*shape: int) -> Tensor:
    """Seeded random numbers that ask for a gradient."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def _unet(sdxl: SimpleNamespace, anima: SimpleNamespace) -> nn.Module:
    return sdxl.unet


def _transformer(sdxl: SimpleNamespace, anima: SimpleNamespace) -> nn.Module:
    return anima.denoiser.transformer


def _for_attention(unet: Any, height: int, width: int) -> dict[str, Any]:
    text = random(1, TEXT_TOKENS, unet.config.cross_attention_dim)
    return {"hidden_states": random(1, 64, height, width), "encoder_hidden_states": text, "return_dict": False}


def _for_resnet(unet: Any, height: int, width: int) -> dict[str, Any]:
    return {"input_tensor": random(1, 32, height, width), "temb": random(1, 4 * unet.config.block_out_channels[0])}


def _for_unet(unet: Any, height: int, width: int) -> dict[str, Any]:
    vector = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "sample": random(1, 4, height, width),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": random(1, TEXT_TOKENS, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": random(1, vector).detach(), "time_ids": torch.zeros(1, 6)},
        "return_dict": False,
    }


def _for_dit_block(transformer: Any, height: int, width: int) -> dict[str, Any]:
    config = transformer.config
    inner = config.num_attention_heads * config.attention_head_dim
    angles = random(height * width, config.attention_head_dim).detach()
    return {
        "hidden_states": random(1, height * width, inner),
        "encoder_hidden_states": random(1, TEXT_TOKENS, config.text_embed_dim),
        "embedded_timestep": random(1, inner),
        "temb": random(1, 3 * inner),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _for_dit(transformer: Any, height: int, width: int) -> dict[str, Any]:
    config = transformer.config
    return {
        "hidden_states": random(1, config.in_channels, 1, height, width),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": random(1, TEXT_TOKENS, config.text_embed_dim),
        "return_dict": False,
    }


BLOCKS = {
    "SDXL attention": Block(denoiser=_unet, path="down_blocks.1.attentions.0", inputs=_for_attention),
    "SDXL ResNet": Block(denoiser=_unet, path="down_blocks.1.resnets.0", inputs=_for_resnet),
    "Anima": Block(denoiser=_transformer, path="transformer_blocks.0", inputs=_for_dit_block),
}
WHOLE = {
    "SDXL": Block(denoiser=_unet, path="", inputs=_for_unet),
    "Anima": Block(denoiser=_transformer, path="", inputs=_for_dit),
}
