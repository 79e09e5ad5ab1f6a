"""What a product in FP8 takes, by the recipe of the report's §3.3.2."""

# N rows (tokens), K columns, I inputs, O outputs, G groups of rows (experts)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rorqual.ops.tile_fp8 import Quantised, quantise_columns, quantise_rows, quantise_weight

_ATTRIBUTE = "_rorqual_fp8"


@dataclass(frozen=True)
class Fp8Options:
    """How values become FP8.

    `use_ue8m0`: scales are powers of two. `gradients`: the tiles of the gradient that goes back to
    activations; `block`, 128x128 as a weight has, is the ablation of App. B.2.
    """

    use_ue8m0: bool = False
    gradients: Literal["tile", "block"] = "tile"

    def activation(self, x: Tensor) -> Quantised:
        """(..., K) as (N, K), 1x128 along K: made once for all products that are given this very
        tensor.
        """
        make = lambda: quantise_rows(x.flatten(0, -2), use_ue8m0=self.use_ue8m0)  # noqa: E731
        if x.is_inference():  # such tensors do not tell whether they were changed
            return make()
        known = getattr(x, _ATTRIBUTE, None)
        if known is not None and known[:2] == (x._version, self):
            found: Quantised = known[2]
            return found
        made = make()
        setattr(x, _ATTRIBUTE, (x._version, self, made))
        return made

    def matrix(self, weight_OI: Tensor) -> Quantised:
        """A weight: 128x128."""
        return quantise_weight(weight_OI, use_ue8m0=self.use_ue8m0)

    def gradient(self, g_NO: Tensor) -> Quantised:
        """As the product with the weight takes it: 1x128 along the outputs."""
        if self.gradients == "block":
            return quantise_weight(g_NO, use_ue8m0=self.use_ue8m0)
        return quantise_rows(g_NO, use_ue8m0=self.use_ue8m0)

    def along_tokens(self, x_NK: Tensor, counts_G: Tensor | None = None) -> Tensor:
        """As a weight's gradient takes an activation or a gradient: 128x1; its float32 values."""
        quantised = quantise_columns(x_NK, counts_G, use_ue8m0=self.use_ue8m0)
        return quantised.dequantise(counts_G)
