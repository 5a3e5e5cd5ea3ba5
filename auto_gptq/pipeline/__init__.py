"""The loop over blocks that turns a model into a quantized one."""
