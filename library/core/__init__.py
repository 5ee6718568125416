"""The ground floor: options, tensor files, atomic writes, keyed randomness, logging. It knows nothing of diffusion."""
