"""Complex numbers and Fourier transforms: linear maps of some dimensions, which must stay whole."""

import torch

from speedup.flow import Flow
from speedup.labels import Labels
from speedup.rules.call import Call, Rule, present
from speedup.rules.pointwise import pointwise, unchanged
from speedup.rules.reduction import whole

aten = torch.ops.aten


def as_real(flow: Flow, call: Call) -> Labels:
    """y[..., 0] = Re x[...], y[..., 1] = Im x[...]."""
    x = call["self"]
    return Labels(call.shape, tuple(plane.unsqueeze(-1).expand(call.shape) for plane in x.planes))


def as_complex(flow: Flow, call: Call) -> Labels:
    """y[...] = x[..., 0] + i x[..., 1]."""
    x = call["self"]
    x = flow.freeze(x, [len(x.shape) - 1], "is a real or an imaginary part", structural=True)
    return Labels(call.shape, tuple(plane[..., 0] for plane in x.planes))


_TRANSFORMS = (
    "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2", "fft_ifft2", "fft_rfft2",
    "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn",
)  # fmt: skip

RULES: dict[object, Rule] = {
    aten.view_as_real.default: Rule("reshape", as_real, moves=True),
    aten.view_as_complex.default: Rule("reshape", as_complex, moves=True),
    **dict.fromkeys((aten.polar.default, aten.complex.default), Rule("elementwise", pointwise)),
    **dict.fromkeys((aten._conj.default, aten.resolve_conj.default), Rule("elementwise", unchanged)),
    **dict.fromkeys(present(_TRANSFORMS), Rule("mixing", whole)),
}
