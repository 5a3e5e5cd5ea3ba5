"""The module that holds the integers."""

from __future__ import annotations

from .. import _old_names

__getattr__ = _old_names.getter(__name__)
