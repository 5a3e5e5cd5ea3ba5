"""What a model has: rows of data, one per layout. Nothing here imports torch."""

from __future__ import annotations

from .architecture import Architecture, matching
from .find import find, knows
from .table import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "find", "knows", "matching"]
