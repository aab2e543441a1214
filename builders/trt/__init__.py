"""Engines of TensorRT and TensorRT for RTX: graphs cut into pieces, each compiled in a process of its own, and read once it is built."""
