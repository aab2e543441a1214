"""The impact of quantization: variants of a bundle, measured; formats chosen by measuring."""
