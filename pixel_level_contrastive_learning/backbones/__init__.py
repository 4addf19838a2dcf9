"""Backbones: a network by its name, weights out and in, a backbone as a file of another library."""
