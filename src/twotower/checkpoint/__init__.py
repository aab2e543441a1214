"""A published checkpoint: its layout as data, its files read with NumPy alone, and made-up ones for tests and benches."""
