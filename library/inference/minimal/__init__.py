"""Drawing in stages with models that are loaded in parts: all texts, then all latents, then all pictures."""
