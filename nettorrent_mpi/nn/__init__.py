"""Layers, losses and optimizers are formulas over a device's operations. They neither communicate nor read files."""
