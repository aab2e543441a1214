"""The kernels themselves, in Triton: the only modules of this package that import it."""
