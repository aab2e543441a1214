"""A TensorRT without a GPU: the fake compiler that builders call, and the fake execution API that engines run on."""
