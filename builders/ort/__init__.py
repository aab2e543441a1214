"""Engines of ONNX Runtime, for a CPU and for its CUDA provider: graphs rewritten into forms it computes well, and their weights."""
