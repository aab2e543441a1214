"""Weights in data files: which a graph declares, where each lies, and how they are read, converted and written."""
