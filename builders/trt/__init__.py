"""Engines of TensorRT and TensorRT for RTX: cut, compiled in processes of their own, and read."""
