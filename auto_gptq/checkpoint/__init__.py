"""Disk: tensors out of checkpoints and into them."""
