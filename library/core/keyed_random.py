"""Keyed randomness: every draw is a pure function of a seed and a key, so worker count, rank and resume change nothing."""

import hashlib
import random

import torch


def keyed_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed from `seed` and `key` (BLAKE2b of their text form); different keys give independent streams."""
    text = "\x1f".join([str(seed), *map(str, key)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU `torch.Generator` for one purpose, for example `keyed_generator(seed, "noise", epoch, position)`."""
    return torch.Generator("cpu").manual_seed(keyed_seed(seed, *key))


def keyed_random(seed: int, *key: int | str) -> random.Random:
    """A `random.Random` for one purpose: shuffles, caption choices, flips."""
    return random.Random(keyed_seed(seed, *key))
