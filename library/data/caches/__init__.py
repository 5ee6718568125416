"""Caches of latents and text states: encoded once before training, kept in memory or on disk, read batch by batch.

On disk an entry is one safetensors file in the folder `.hadron_cache` beside the images, named by a hash of all that it depends on
(image bytes, mask, resizing, crop, mirroring and model; for text the caption as encoded, and the model). What changes gets another
name and is encoded anew; what is broken is replaced. Several processes may fill one folder. It may be deleted at any time.
"""

from library.data.caches.latents import CachedLatents, fill_latents
from library.data.caches.npz import NpzLatents, NpzText
from library.data.caches.text import CachedText, fill_text

__all__ = ["CachedLatents", "CachedText", "NpzLatents", "NpzText", "fill_latents", "fill_text"]
