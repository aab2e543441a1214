"""How good a bundle is: the suite, both modes on it, what quantization costs, and presets chosen by measuring."""
