"""sd-scripts' cached text states of Anima: what its files hold, and what the model wants of it."""

import numpy as np
import torch

from library.data.batch import TextStates
from library.data.caches.npz import Arrays, NpzText

NAMES = {"prompt_embeds": "hidden_states", "attn_mask": "mask", "t5_input_ids": "t5_ids", "t5_attn_mask": "t5_mask"}
"""Of each array in a file -> of the state that it is."""


def text_files(qwen_length: int, t5_length: int, width: int) -> NpzText:
    """How the files are named and read. The dropout rate that they hold besides is not read: it is applied in training."""
    shapes = {
        "prompt_embeds": (qwen_length, width),
        "attn_mask": (qwen_length,),
        "t5_input_ids": (t5_length,),
        "t5_attn_mask": (t5_length,),
    }
    return NpzText(suffix="_anima_te.npz", shapes=shapes, ready=text_states)


def text_states(arrays: Arrays) -> TextStates:
    """The states of one caption: `hidden_states` (length, width) float32, zero outside `mask`; ids and masks int64."""
    states = {
        name: torch.from_numpy(arrays[stored].astype(np.float32 if stored == "prompt_embeds" else np.int64))
        for stored, name in NAMES.items()
    }
    return {**states, "hidden_states": states["hidden_states"].masked_fill(states["mask"].unsqueeze(-1) == 0, 0)}
