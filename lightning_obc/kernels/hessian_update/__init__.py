"""Accumulation of ``Σ x xᵀ`` over the input positions of a layer, per problem, in float64.

``naive`` is the oracle (everything in float64, written to be read); ``linear`` and ``conv`` are the fast paths:
float32 products of at most about a thousand positions, added in float64. They run on any device.
"""

from __future__ import annotations

from lightning_obc.kernels.hessian_update.conv import accumulate_conv_
from lightning_obc.kernels.hessian_update.cross import accumulate_cross_conv_, accumulate_cross_linear_
from lightning_obc.kernels.hessian_update.geometry import ConvGeometry
from lightning_obc.kernels.hessian_update.linear import accumulate_linear_, symmetrise_
from lightning_obc.kernels.hessian_update.naive import naive_conv, naive_linear
from lightning_obc.kernels.hessian_update.precision import exact_products, ieee_float32
from lightning_obc.kernels.hessian_update.sampling import PositionSample, sampled_positions

__all__ = [
    "ConvGeometry",
    "PositionSample",
    "accumulate_conv_",
    "accumulate_cross_conv_",
    "accumulate_cross_linear_",
    "accumulate_linear_",
    "exact_products",
    "ieee_float32",
    "naive_conv",
    "naive_linear",
    "sampled_positions",
    "symmetrise_",
]
