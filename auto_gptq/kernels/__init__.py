"""The operators ``torch.ops.auto_gptq.*`` and what computes them."""
