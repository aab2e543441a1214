"""A TensorRT without a GPU: the compiler that builders call, and the execution API."""
