"""The one module that is trained: base models and network together.

Wrapping base and adapters in one `nn.Module` whose forward runs both is what makes DDP, FSDP2 and DeepSpeed synchronise the
adapters' gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.data.batch import Sizes, TextStates
from library.models.architecture import Architecture, Tokens


class TrainingModel(nn.Module):
    """Denoiser, text encoders and network; calling it gives the denoiser's guess.

    The text encoders run with gradients only where `trains_text_encoders` says that adapters sit on them.
    """

    def __init__(
        self, arch: Architecture, denoiser: nn.Module, text_encoders: Sequence[nn.Module], network: nn.Module, *, trains_text_encoders: bool
    ) -> None:
        super().__init__()
        self.arch = arch
        self.denoiser = denoiser
        self.text_encoders = nn.ModuleList(text_encoders)
        self.network = network
        self.trains_text_encoders = trains_text_encoders
        # every rank loads the base itself: DDP need not send it round, and swapped blocks may wait on another device than the rest
        base = ("denoiser.", "text_encoders.")
        frozen = [*(name for name, parameter in self.named_parameters() if not parameter.requires_grad), *dict(self.named_buffers())]
        self._ddp_params_and_buffers_to_ignore = [name for name in frozen if name.startswith(base)]

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tokens | TextStates, sizes: Sizes) -> Tensor:
        """The guess, in the shape of `noisy`. `text` holds text states where they were cached, token ids otherwise."""
        if set(text) != set(self.arch.text_keys):
            with torch.set_grad_enabled(self.trains_text_encoders and torch.is_grad_enabled()):
                text = self.arch.encode_text(list(self.text_encoders), text)
        return self.arch.predict(self.denoiser, noisy, timesteps, text, sizes)

    def train(self, mode: bool = True) -> "TrainingModel":
        """Switch the network's dropouts only; the frozen models stay in the mode that they were given in."""
        self.training = mode
        self.network.train(mode)
        return self
