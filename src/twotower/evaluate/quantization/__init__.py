"""What quantization costs and brings: bundles beside the float one, mixtures that are never written, formats chosen by measuring."""
