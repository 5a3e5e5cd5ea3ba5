"""The tensor that ``QuantLinear.weight`` gives: it computes like any other and refuses writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import DerivedWeightError

HOW = (
    "The weight of a quantized layer is derived from its packed integers at every access, so "
    "writing into it would be lost. Use pack() to replace the integers; to merge or initialize "
    "an adapter, load the full-precision model."
)

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "div", "mod", "pow", "matmul")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_WRITING = {"__set__", "__setitem__", *(f"__i{name}__" for name in (*_OPERATORS, *_BITWISE))}
_SET_REQUIRES_GRAD = Tensor.requires_grad.__set__  # type: ignore[attr-defined]


class DerivedWeight(Tensor):
    """A dense weight that raises on every way to write into it, through its views too.

    What is computed from it is a plain tensor.
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation unless it writes into a derived weight."""
        kwargs = kwargs or {}
        if _written(func, args, kwargs):
            raise DerivedWeightError(HOW)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            derived = next((arg for arg in args if isinstance(arg, cls)), None)
            return result if derived is None else _marked(result, derived)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def _written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether an operation would write into a derived weight."""
    if _is_derived(kwargs.get("out")):
        return True
    target = args[0] if args else next(iter(kwargs.values()), None)
    if not _is_derived(target):
        return False
    name = getattr(func, "__name__", "").partition(".")[0]  # an OpOverload says "add_.Tensor"
    if name == "requires_grad_" or func == _SET_REQUIRES_GRAD:
        # PEFT freezes weights that are frozen already: nothing to refuse.
        return bool(args[1] if len(args) > 1 else kwargs.get("requires_grad", True))
    return (
        bool(kwargs.get("inplace"))
        or name in ("__set__", "__setitem__")
        or (
            name.startswith("__i") and name.endswith("__") and name not in ("__int__", "__invert__")
        )
        or (name.endswith("_") and not name.endswith("__"))
    )


def _is_derived(value: Any) -> bool:
    if isinstance(value, (list, tuple)):  # what the foreach operations take
        return any(isinstance(item, DerivedWeight) for item in value)
    return isinstance(value, DerivedWeight)


def _marked(result: Any, source: Tensor) -> Any:
    """Make views of a derived weight derived as well, so that writes into them raise."""
    if type(result) in (list, tuple):
        return type(result)(_marked(item, source) for item in result)
    if type(result) is Tensor and _storage(result) == _storage(source):
        return result.as_subclass(DerivedWeight)
    return result


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
