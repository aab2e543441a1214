"""Weights of a bundle on devices: read once, shared by every engine of a tower."""
