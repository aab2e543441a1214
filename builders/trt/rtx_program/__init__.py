"""The compiled program a TensorRT for RTX plan carries as text, read without a GPU."""
