"""Augmented views of volumes and radiographs: pure functions of (array, parameters), numpy or jax."""
