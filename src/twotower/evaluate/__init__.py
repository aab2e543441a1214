"""Quality of a bundle on a suite: both modes, the impact of quantization, tuned presets."""
