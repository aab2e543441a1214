"""Time and memory of export and generation, and the checkpoints to measure them on."""
