"""Weights in data files: which a graph declares, where each lies, how they are read and written."""
