"""CUDA for the runtime: checked calls, streams and events, device memory, captured graphs."""
