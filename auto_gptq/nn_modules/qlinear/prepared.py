"""A packed weight in one of two layouts: the checkpoint's, or tiles for the fast kernels.

Only one of them is in memory. Whoever reads ``qweight``, ``qzeros``, ``scales`` or ``g_idx``, the
state dict or a pickle sees the checkpoint's tensors, bit for bit, whichever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...formats.gptq import GPTQTensors
from ...formats.tiles import (
    TileTensors,
    pad,
    sort_groups,
    tile_zeros,
    untile_g_idx,
    untile_scales,
    untile_zeros,
)
from ...kernels import choose

PACKED = ("qweight", "qzeros", "scales", "g_idx")
TILED = ("tiles", "tile_scales", "tile_zeros", "perm")


def _packed_tensor(name: str) -> Any:
    """Make the attribute that gives one of the checkpoint's tensors in both layouts."""

    def read(self: PackedWeight) -> Tensor:
        tensor = self._buffers.get(name)
        if tensor is not None:
            return tensor
        if self.is_prepared:
            return self._restored(name)
        raise AttributeError(f"{type(self).__name__} has no {name} yet")

    def write(self: PackedWeight, value: Tensor) -> None:
        # nn.Module writes into its buffers by itself; this is reached where there is none.
        self.restore()
        self._buffers[name] = value

    return property(read, write)


class PackedWeight(nn.Module):
    """The buffers of a packed weight, and the way between its two layouts."""

    bits: int
    group_size: int
    in_features: int
    out_features: int
    zero_offset: int
    # Asked for by prepare(): after a move or new values, the weight is laid out anew.
    stays_prepared = False

    qweight = _packed_tensor("qweight")
    qzeros = _packed_tensor("qzeros")
    scales = _packed_tensor("scales")
    g_idx = _packed_tensor("g_idx")

    @property
    def is_prepared(self) -> bool:
        """Whether the weight lies in tiles."""
        return "tiles" in self._buffers

    def prepare(self) -> None:
        """Lay the weight out for the fastest kernel that serves it, and stay so from now on.

        Where none but those over the checkpoint's tensors does, nothing changes.
        """
        self.stays_prepared = True
        if self.is_prepared or choose.choose(self._described()).layout != "tiles":
            return
        qweight, qzeros, scales, g_idx = (getattr(self, name) for name in PACKED)
        perm, _ = sort_groups(g_idx, self.group_size)
        tiles = torch.ops.auto_gptq.repack_tiles(qweight, perm, self.bits, self.group_size)
        scales = pad(scales, 1).contiguous()
        # Looking at the zeros waits for a GPU: for tiles and scales too, which kernels then read
        # while the kernel in front of them still runs.
        zeros = tile_zeros(qzeros, self.bits, self.zero_offset)
        for name in PACKED:
            del self._buffers[name]
        tiled = tiles, scales, zeros, perm
        for name, tensor in zip(TILED, tiled, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def restore(self) -> None:
        """Lay the weight out as in the checkpoint."""
        if not self.is_prepared:
            return
        buffers = self._packed_buffers()
        for name in TILED:
            delattr(self, name)
        self._buffers.clear()
        self._buffers.update(buffers)

    def _packed_buffers(self) -> dict[str, Tensor | None]:
        """Give all buffers as they are in the checkpoint's layout, in that order."""
        kept = {name: tensor for name, tensor in self._buffers.items() if name not in TILED}
        return {name: getattr(self, name) for name in PACKED} | kept

    def packed(self) -> GPTQTensors:
        """Give the checkpoint's tensors, computed anew where the weight lies in tiles."""
        return GPTQTensors(*(getattr(self, name) for name in PACKED))

    def _restored(self, name: str) -> Tensor:
        tiled = TileTensors(*(self._buffers[each] for each in TILED))  # type: ignore[arg-type]
        if name == "qzeros":
            return untile_zeros(tiled, self.bits, self.zero_offset, self.out_features)
        if name == "scales":
            return untile_scales(tiled, self.out_features)
        if name == "g_idx":
            return untile_g_idx(tiled, self.group_size, self.in_features)
        qweight: Tensor = torch.ops.auto_gptq.unrepack_tiles(
            tiled.tiles, tiled.perm, *self._settings()
        )
        return qweight

    def explain(self) -> str:
        """Say which kernel computes with the weight, and why each faster one does not."""
        return choose.explain(self._described())

    def _unfit(self) -> str | None:
        """Say why these tensors stay in the checkpoint's layout whatever kernels there are."""
        if self.qweight.is_meta:
            return "the tensors are on the meta device"
        hook = getattr(self, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook])):
            return "accelerate offloads the tensors"
        return sort_groups(self.g_idx, self.group_size)[1]

    def _described(self) -> choose.Weight:
        buffers = self._buffers
        tensor = buffers["tiles"] if self.is_prepared else buffers["qweight"]
        assert tensor is not None
        unfit = None if self.is_prepared else self._unfit()
        return choose.Weight(tensor.device, self.bits, self.group_size, unfit)

    def _settings(self) -> tuple[int, int, int, int]:
        return self.bits, self.group_size, self.in_features, self.out_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Move with the model, but keep the dtype of the scales: half() must not round them."""
        self.restore()
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        self._lay_out_again()
        return self

    def _lay_out_again(self) -> None:
        if self.stays_prepared:
            self.prepare()

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.is_prepared:
            names = (name for name in PACKED if name not in self._non_persistent_buffers_set)
            destination |= {f"{prefix}{name}": getattr(self, name) for name in names}
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        self._lay_out_again()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.is_prepared:
            state["_buffers"] = self._packed_buffers()
            state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - set(TILED)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lay_out_again()
