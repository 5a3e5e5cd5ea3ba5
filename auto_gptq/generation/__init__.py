"""The decoding loop: one token after another without the host in between."""
