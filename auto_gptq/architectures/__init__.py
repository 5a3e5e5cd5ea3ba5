"""What a model has: rows of data, one per layout. Nothing here imports torch."""

from __future__ import annotations

from .architecture import Architecture
from .find import find
from .table import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "find"]
