"""Faults on purpose: kills, full and broken disks, flipped bits; `make faults`, `make soak`."""
