"""Data in: examples, built-in texts, and the states that enter each block."""
