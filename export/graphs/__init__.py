"""The three ONNX graphs of the contract, written operator by operator from the model config."""
