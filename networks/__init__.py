"""Changes of layers: LoRA, LoHa and LoKr adapters, and the networks made of them."""
