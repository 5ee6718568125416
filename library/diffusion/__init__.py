"""Noise processes, timesteps, losses and samplers. It knows nothing of models."""
