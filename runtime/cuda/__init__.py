"""CUDA for the runtime: calls with checked results, streams and events, device memory, captured graphs. The library is a value."""
