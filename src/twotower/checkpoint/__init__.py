"""A published checkpoint: layout, files read without torch or safetensors, synthetic ones."""
