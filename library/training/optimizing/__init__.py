"""What updates the network: optimizers, learning rates and their schedules."""
