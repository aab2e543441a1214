"""Engines of ONNX Runtime, for a CPU and for its CUDA provider."""
