"""Convolutions over time, channel by channel: short ones with a state, and long ones by FFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from foveate.ops.checks import check_floating, check_shape


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal convolution y_t = Σ_i weight_i x_{t-width+1+i} + bias of each channel, and its state.

    x (B, T, C), weight (C, width) whose last column is that of the token itself, bias (C,), state
    the width - 1 inputs before (B, width - 1, C) or None for zeros -> y (B, T, C), state after the
    last token. Tokens outside of `valid` (B, T) bool, which must come last in a row, count as
    zeros and do not enter the state. Raises ValueError or TypeError for what does not fit together.
    """
    check_floating(x=x, weight=weight, bias=bias, state=state)
    if x.dim() != 3:
        raise ValueError(f"x must be (batch, length, channels), got {tuple(x.shape)}")
    rows, length, channels = x.shape
    width = weight.shape[-1]
    check_shape("weight", weight, (channels, width))
    if state is None:
        state = x.new_zeros(rows, width - 1, channels)
    check_shape("state", state, (rows, width - 1, channels))
    if valid is not None:
        check_shape("valid", valid, (rows, length))
        x = x.masked_fill(~valid[..., None], 0.0)
    seen = torch.cat((state.to(x.dtype), x), 1)
    y = conv1d(seen.mT, weight[:, None], bias, groups=channels).mT
    if valid is None:
        return y, seen[:, length:]
    last = valid.sum(1, keepdim=True) + torch.arange(width - 1, device=x.device)
    return y, seen.gather(1, last[..., None].expand(-1, -1, channels))


def fft_conv(x: Tensor, kernel: Tensor, *, circular: bool = False) -> Tensor:
    """Convolution y_t = Σ_{j≤t} kernel_j x_{t-j} of each channel, by FFT: O(T log T).

    x (B, T, C), kernel (C, n) or one for each row (B, C, n), n <= T -> (B, T, C) in x's type.
    `circular` lets what comes before the first token be the end of the sequence. Raises
    ValueError or TypeError for what does not fit together.
    """
    check_floating(x=x, kernel=kernel)
    if x.dim() != 3 or kernel.dim() not in (2, 3):
        raise ValueError(
            f"x must be (batch, length, channels) and kernel (channels, n) or (batch, channels, n),"
            f" got {tuple(x.shape)} and {tuple(kernel.shape)}"
        )
    length, lags = x.shape[1], kernel.shape[-1]
    check_shape("kernel", kernel, (*(x.shape[:1] if kernel.dim() == 3 else ()), x.shape[2], lags))
    if lags > length:
        raise ValueError(f"kernel has {lags} lags, x only {length} tokens")
    wide = torch.promote_types(x.dtype, torch.float32)
    size = length if circular else 2 * length
    product = torch.fft.rfft(x.to(wide).mT, n=size) * torch.fft.rfft(kernel.to(wide), n=size)
    return torch.fft.irfft(product, n=size)[..., :length].mT.to(x.dtype)
