"""From a model type to its row."""

from __future__ import annotations

from ..errors import UnsupportedModelError
from .architecture import Architecture
from .table import ARCHITECTURES

_BY_MODEL_TYPE = {model_type: row for row in ARCHITECTURES for model_type in row.block_classes}


def model_types() -> list[str]:
    """Give every model type that has a row."""
    return list(_BY_MODEL_TYPE)


def knows(architecture: Architecture) -> bool:
    """Tell whether a row says the same as one of the table."""
    return any(
        row.blocks == architecture.blocks and row.steps == architecture.steps
        for row in ARCHITECTURES
    )


def find(model_type: str) -> Architecture:
    """Give the row of a model type.

    :raises UnsupportedModelError: (a TypeError) if there is none
    """
    try:
        return _BY_MODEL_TYPE[model_type]
    except KeyError:
        raise UnsupportedModelError(
            f"{model_type} isn't supported yet. Known model types: {sorted(_BY_MODEL_TYPE)}. "
            "A model of the same layout as one of them needs one line in "
            "auto_gptq/architectures/table.py."
        ) from None
