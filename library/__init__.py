"""Everything Hadron is made of besides its adapters: core, diffusion, data, models, training, inference."""
