"""A published checkpoint: its layout as data, its files read with neither torch nor safetensors, and made-up ones for tests and benches."""
