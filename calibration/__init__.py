"""Activation statistics from real denoising runs, and the quantization recipes made of them; nothing is written here yet."""

__all__: list[str] = []
