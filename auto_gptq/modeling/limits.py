"""What a model's configuration says about its inputs."""

from __future__ import annotations

from typing import Any

# Where the configurations of different architectures keep their longest sequence.
_LONGEST = ("max_position_embeddings", "seq_length", "n_positions")


def longest_sequence(config: Any) -> int | None:
    """Give the number of tokens that the model was made for, if its configuration says."""
    lengths = (getattr(config, key, None) for key in _LONGEST)
    return next((length for length in lengths if length), None)


def padding_token(config: Any) -> int:
    """Give a token to pad with.  Any known one will do, since padding is masked everywhere."""
    for key in ("pad_token_id", "eos_token_id"):
        candidate = getattr(config, key, None)
        first = candidate[0] if isinstance(candidate, (list, tuple)) else candidate
        known = getattr(config, "vocab_size", None)
        if isinstance(first, int) and first >= 0 and (known is None or first < known):
            return first
    return 0
