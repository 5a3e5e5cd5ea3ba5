"""A third file, which only the modeling file names."""

import torch


def rotated(x, start):
    """Turn pairs of numbers by their position; x is [rows, tokens, heads, size]."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(start, start + x.shape[1], device=x.device)[:, None] * speed
    sin, cos = (f(angle)[None, :, None].to(x.dtype) for f in (torch.sin, torch.cos))
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
