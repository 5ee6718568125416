"""Several processes: how they meet, and the engines that share gradients and weights among them."""
