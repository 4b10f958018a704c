"""The matrix products of a model, which take most of the time of a step."""

from __future__ import annotations

import torch
from torch.nn.functional import linear


class Linear:
    """`x @ weight.T + bias`, with the weight laid out once the way the CPU's kernels read it.

    Packed weights were measured faster at every number of rows from 1 to 1,024: in bf16 and fp32, a decode of one row
    takes 0.4 of the time. The original layout is not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` [out_features, in_features] and `bias` [out_features], on their device and in their final dtype."""
        self.packed = _can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS) if self.packed else weight
        self._bias = bias

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, in_features] -> [rows, out_features], with `residual` of that shape added to it."""
        if not self.packed:
            out = linear(x, self._weight, self._bias)
            return out if residual is None else out.add_(residual)
        if residual is None:
            packed_out: torch.Tensor = _packed_linear(x, self._weight, self._bias, "none", [], "")
        else:
            packed_out = _packed_linear_binary(x, residual, self._weight, self._bias, "add")
        return packed_out


_PACKED_FOR_ROWS = 16
"""The number of rows the layout is chosen for; it serves every other number too."""
_HAS_PACKING = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # type: ignore[no-untyped-call]
if _HAS_PACKING:
    _packed_linear = torch.ops.mkldnn._linear_pointwise.default
    _packed_linear_binary = torch.ops.mkldnn._linear_pointwise.binary


def _can_pack(weight: torch.Tensor) -> bool:
    if not _HAS_PACKING or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
