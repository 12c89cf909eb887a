"""Reading and writing at places: gather, scatter, index_put, slices in steps, patches; transforms; what no input reaches."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from test_rules import Case, Net, check, conv, image, parameters, tokens, weight
from torch import Tensor, nn

A8 = "8: a.weight/0 a.bias/0 o.weight/1"
AB8 = "8: a.weight/0 a.bias/0 b.weight/0 b.bias/0 o.weight/1"
AV8 = "8: a.weight/0 a.bias/0 v/0 o.weight/1"


def over_tokens(function: Callable[[Net, Tensor], Tensor], out: int = 8, **parts: Any) -> Callable[[], Net]:
    """Linear, the function, linear; what is written for a part makes it."""
    return lambda: Net(
        lambda n, x: n.o(function(n, n.a(x))),
        a=nn.Linear(12, 8),
        o=nn.Linear(out, 2),
        **{name: part() for name, part in parts.items()},
    )


def over_image(
    function: Callable[[Net, Tensor], Tensor], out: int = 8, width: int = 8, **parts: Any
) -> Callable[[], Net]:
    """Convolution, the function, convolution."""
    return lambda: Net(
        lambda n, x: n.o(function(n, n.a(x))),
        a=conv(3, width),
        o=conv(out, 2, 1),
        **{name: part() for name, part in parts.items()},
    )


def written(place: Callable[[Net], Any], value: Callable[[Net, Tensor], Any]) -> Callable[[Net, Tensor], Tensor]:
    """A copy of a tensor with a value written in some of its places."""

    def write(n: Net, y: Tensor) -> Tensor:
        z = y.clone()
        z[place(n)] = value(n, y)
        return z

    return write


def added_to_some(n: Net, y: Tensor) -> Tensor:
    z = y.clone()
    z[:, [0, 2]] += n.v
    return z


def every_scatter(n: Net, y: Tensor) -> Tensor:
    index = y.argsort(1)
    z = y.scatter(1, index, y).scatter_add(1, index, y).scatter_reduce(1, index, y, "sum").scatter(1, index, 1.5)
    z = (
        z.clone()
        .scatter_(1, index, y)
        .scatter_(1, index, 0.5)
        .scatter_add_(1, index, y)
        .scatter_reduce_(1, index, y, "sum")
    )
    rows = torch.tensor([0, 1, 0, 1, 2])
    z = z.index_add(1, rows, y).index_copy(1, torch.tensor([4, 3, 2, 1, 0]), y).index_fill(1, rows, 0.5)
    return z.index_add_(1, rows, y).index_copy_(1, torch.tensor([4, 3, 2, 1, 0]), y).index_fill_(1, rows, 2.0)


def shifted(n: Net, y: Tensor) -> Tensor:
    """Patches compared with their middle: local attention by hand."""
    patches = F.unfold(y, 3, padding=1).unflatten(1, (-1, 9))
    scores = (patches * y.flatten(2)[:, :, None]).sum(1, keepdim=True).softmax(2)
    return (patches * scores).sum(2).unflatten(2, (6, 6))


def filtered(n: Net, y: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(y) * torch.view_as_complex(n.w), s=(6, 6))


def few_modes(n: Net, y: Tensor) -> Tensor:
    """A Fourier layer: a product of channels for each of the lowest frequencies."""
    spectrum = torch.fft.rfft2(y)
    out = torch.zeros(y.shape[0], 6, 6, 4, dtype=torch.cfloat)
    out[:, :, :3, :3] = torch.einsum("bixy,ioxy->boxy", spectrum[:, :, :3, :3], n.w)
    return torch.fft.irfft2(out, s=(6, 6))


def every_transform(n: Net, y: Tensor) -> Tensor:
    f = torch.fft
    z = f.ifft2(f.fft2(y)).real + f.ifft(f.fft(y)).real + f.irfft(f.rfft(y)) + f.hfft(f.ihfft(y))
    z = z + f.ifftn(f.fftn(y, dim=(2, 3)), dim=(2, 3)).real + f.irfftn(f.rfftn(y, dim=(2, 3)), dim=(2, 3))
    return z + torch.view_as_real(torch.complex(y, y).conj().resolve_conj()).sum(-1) + f.fft(y).conj().abs()


PLACES = (
    Case("gather_over_tokens", over_tokens(lambda n, y: torch.gather(y, 1, y.argsort(1))), tokens(), (A8,)),
    Case("gather_by_a_score", over_tokens(lambda n, y: y.gather(1, n.s(y).topk(3, 1).indices.expand(-1, -1, 8)), s=lambda: nn.Linear(8, 1)), tokens(), ("8: a.weight/0 a.bias/0 o.weight/1 s.weight/1",)),
    Case("gather_by_another_tensor", over_tokens(lambda n, y: y.gather(1, n.b(y).argsort(1)), b=lambda: nn.Linear(8, 8)), tokens(), ("8: a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 o.weight/1",)),
    Case("gather_over_features_pins", lambda: Net(lambda n, x: n.p(n.o(n.a(x).gather(2, x[..., :4].abs().long()))), a=nn.Linear(12, 8), o=nn.Linear(4, 6), p=nn.Linear(6, 2)), tokens(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "is gathered by an index"}),
    Case("gather_of_fewer_pins", lambda: Net(lambda n, x: n.p(n.o(n.a(x).gather(1, n.a(x).argsort(1)[..., :4]))), a=nn.Linear(12, 8), o=nn.Linear(4, 6), p=nn.Linear(6, 2)), tokens(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0*4": "is gathered by an index"}),
    Case("every_scatter", over_tokens(every_scatter), tokens(), (A8,), mixes=True),  # a fill is not masked
    Case("written_at_tokens", over_tokens(written(lambda n: (slice(None), [0, 2]), lambda n, y: n.b(y)[:, :2]), b=lambda: nn.Linear(8, 8)), tokens(), ("8: a.weight/0 a.bias/0 b.weight/0 b.weight/1 b.bias/0 o.weight/1",)),
    Case("a_vector_written_at_tokens", over_tokens(written(lambda n: (slice(None), [0, 2]), lambda n, y: n.v), v=lambda: weight(8)), tokens(), (AV8,)),
    Case("a_vector_written_elsewhere", over_tokens(lambda n, y: y.permute(1, 2, 0).index_put((torch.tensor([0, 2]),), n.v[:, None]).permute(2, 0, 1), v=lambda: weight(8)), tokens(), (AV8,)),
    Case("a_vector_written_at_pixels", over_image(written(lambda n: (slice(None), slice(None), [0, 2], [1, 3]), lambda n, y: n.v[:, None]), v=lambda: weight(8)), image(), (AV8,)),
    Case("a_table_added_at_tokens", over_tokens(added_to_some, v=lambda: weight(2, 8)), tokens(), ("8: a.weight/0 a.bias/0 v/1 o.weight/1",), {"v/0": "size is fixed"}),
    Case("a_number_where_negative", over_image(lambda n, y: written(lambda n: y < 0, lambda n, y: 0.5)(n, y)), image(), (A8,)),
    Case("a_number_in_a_mask_of_space", over_image(written(lambda n: (slice(None), slice(None), n.m), lambda n, y: 1.5), m=lambda: torch.eye(6) > 0), image(), (A8,)),
    Case("a_number_in_a_mask_of_channels_pins", lambda: Net(lambda n, x: n.p(n.o(written(lambda n: (slice(None), n.m), lambda n, y: 1.5)(n, n.a(x)))), a=nn.Linear(12, 8), m=torch.eye(5, 8) > 0, o=nn.Linear(8, 6), p=nn.Linear(6, 2)), tokens(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "size is fixed"}),
    Case("a_vector_in_a_mask_of_tokens", over_tokens(written(lambda n: (slice(None), n.m), lambda n, y: n.v), m=lambda: torch.arange(5) > 2, v=lambda: weight(8)), tokens(), (AV8,)),
    Case("written_at_channels_pins", over_image(written(lambda n: (slice(None), [1, 4, 6]), lambda n, y: n.b(y)), b=lambda: conv(8, 3)), image(), (), {"a.weight/0": "is written at places", "b.weight/0": "is written at places"}),
    Case("written_apart_pins", lambda: Net(lambda n, x: n.p(n.o(written(lambda n: (slice(None), [0, 2], slice(None), [1, 3]), lambda n, y: 0.5)(n, n.a(x)))), a=conv(3, 8), o=conv(8, 6), p=conv(6, 2)), image(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "is written at places"}),
    Case("a_token_for_what_is_masked", lambda: Net(lambda n, x: n.o(torch.where(x.sum(-1, keepdim=True) > 0, n.v, n.a(x))), a=nn.Linear(12, 8), v=weight(8), o=nn.Linear(8, 2)), tokens(), (AV8,)),
)  # fmt: skip

STEPS = (
    Case("pairs_of_channels", over_image(lambda n, y: y[:, ::2] * y[:, 1::2], 4), image(), ("4: a.weight/0 a.bias/0 o.weight/1",)),
    Case("every_third_channel", over_image(lambda n, y: y[:, 2::3], 4, 12), image(), ("12: a.weight/0 a.bias/0 o.weight/1",)),
    Case("every_third_channel_from_the_middle", lambda: Net(lambda n, x: n.o(n.a(x)[:, 4:-2:3]) + n.p(n.a(x)), a=conv(3, 12), o=conv(2, 2), p=conv(12, 2)), image(), ("12: a.weight/0 a.bias/0 o.weight/1 p.weight/1",)),
    Case("even_then_odd_channels", over_image(lambda n, y: torch.cat([y[:, ::2], y[:, 1::2]], 1)), image(), (A8,)),
    Case("two_steps_at_once", lambda: Net(lambda n, x: n.o(n.a(x)[:, ::2]) + n.p(n.a(x)[:, 1::3]), a=conv(3, 12), o=conv(6, 2), p=conv(4, 2)), image(), ("12: a.weight/0 a.bias/0 o.weight/1 p.weight/1",)),
    Case("narrow", over_image(lambda n, y: y.narrow(1, 2, 5), 5), image(), ("5: a.weight/0*5 a.bias/0*5 o.weight/1", "3: a.weight/0*3 a.bias/0*3")),
    Case("tile", over_image(lambda n, y: y.tile((1, 2, 1, 1)), 8, 4), image(), ("4: a.weight/0 a.bias/0 o.weight/1",)),
    Case("a_token_tiled_over_the_batch", over_tokens(lambda n, y: torch.cat([n.v.tile((y.shape[0], 1, 1)), y], 1), v=lambda: weight(1, 1, 8)), tokens(), ("8: a.weight/0 a.bias/0 v/2 o.weight/1",)),
    Case("flip_of_a_residual_ties_pairs", over_image(lambda n, y: y + y.flip(1)), image(), ("4: a.weight/0 a.bias/0 o.weight/1",)),
    Case("difference_of_neighbours_pins", over_image(lambda n, y: y[:, 1:] - y[:, :-1], 7), image(), (), {"a.weight/0": "would have to go all at once"}),
)  # fmt: skip

PATCHES = (
    Case("patches_as_channels", over_image(lambda n, y: F.unfold(y, 3, padding=1).unflatten(2, (6, 6)), 72), image(), (A8,)),
    Case("patches_compared", over_image(shifted), image(), (A8,)),
    Case("patches_folded_back", over_image(lambda n, y: F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1)), image(), (A8,)),
    Case("windows_over_tokens", over_tokens(lambda n, y: y.unfold(1, 2, 1).mean(-1)), tokens(), (A8,)),
    Case("channel_shuffle_by_its_name", over_image(lambda n, y: n.g(F.channel_shuffle(y, 2)), g=lambda: conv(8, 8, groups=2)), image(), ("8: a.weight/0 a.bias/0 g.weight/01", "8: g.weight/0 g.bias/0 o.weight/1")),
    Case("grid_sample", over_image(lambda n, y: F.grid_sample(y, n.f(y).permute(0, 2, 3, 1).tanh(), align_corners=False), f=lambda: conv(8, 2)), image(), ("8: a.weight/0 a.bias/0 f.weight/1 o.weight/1",), {"f.weight/0": "steers"}),
    Case("pixel_shuffle_after_cat", lambda: Net(lambda n, x: n.o(F.pixel_shuffle(torch.cat([n.a(x), n.b(x)], 1), 2)), a=conv(3, 8), b=conv(3, 8), o=conv(4, 2)), image(), ("2: a.weight/0 a.bias/0 o.weight/1*2", "2: b.weight/0 b.bias/0 o.weight/1*2")),
)  # fmt: skip

TRANSFORMS = (
    Case("every_transform_of_space", over_image(every_transform), image(), (A8,)),
    Case("filter_of_frequencies", over_image(filtered, w=lambda: weight(8, 6, 4, 2)), image(), ("8: a.weight/0 a.bias/0 w/0 o.weight/1",), {"w/3": "is a real or an imaginary part"}),
    Case("product_of_low_frequencies", over_image(few_modes, 6, w=lambda: nn.Parameter(torch.randn(8, 6, 3, 3, dtype=torch.cfloat))), image(), ("8: a.weight/0 a.bias/0 w/0", "6: w/1 o.weight/1")),
    Case("transform_of_tokens", over_tokens(lambda n, y: torch.fft.fft(y, dim=1).real), tokens(), (A8,)),
    Case("transform_of_channels_pins", lambda: Net(lambda n, x: n.p(n.o(torch.fft.fft(n.a(x)).real)), a=nn.Linear(12, 8), o=nn.Linear(8, 6), p=nn.Linear(6, 2)), tokens(), ("6: o.weight/0 o.bias/0 p.weight/1",), {"a.weight/0": "goes through aten.fft_fft.default over its channels"}),
    Case("sum_of_exponentials_so_far", over_tokens(lambda n, y: y.logcumsumexp(1)), tokens(), (A8,)),
)  # fmt: skip

UNREACHED = (
    Case("positions_beyond_the_length", over_tokens(lambda n, y: y + n.p[: y.shape[1]], p=lambda: weight(20, 8)), tokens(), ("8: a.weight/0 a.bias/0 p/1 o.weight/1",), {"p/0": "is not used by inputs like the example"}),
    Case("scaled_positions_beyond_the_length", over_tokens(lambda n, y: y + (2.0 * n.p)[: y.shape[1]], p=lambda: weight(20, 8)), tokens(), ("8: a.weight/0 a.bias/0 p/1 o.weight/1",), {"p/0": "is not used by inputs like the example"}),
    Case("sinusoids_beyond_the_length", over_tokens(lambda n, y: y + n.p[:, : y.shape[1]], p=lambda: torch.randn(1, 20, 8)), tokens(), ("8: a.weight/0 a.bias/0 p/2 o.weight/1",), {"p/1": "is not used by inputs like the example"}),
    Case("positions_picked_by_an_index", over_tokens(lambda n, y: y + n.p.index_select(0, n.i), p=lambda: weight(9, 8), i=lambda: torch.tensor([8, 6, 4, 2, 0])), tokens(), ("8: a.weight/0 a.bias/0 p/1 o.weight/1",), {"p/0": "is not used by inputs like the example"}),
    Case("a_part_of_a_wider_weight", lambda: Net(lambda n, x: n.o(F.linear(n.a(x), n.w[:6, :8])), a=nn.Linear(12, 8), w=weight(10, 12), o=nn.Linear(6, 2)), tokens(), ("8: a.weight/0 a.bias/0 w/1*8", "6: w/0*6 o.weight/1"), {"w/0*4": "is not used by inputs like the example", "w/1*4": "is not used by inputs like the example"}),
)  # fmt: skip

CASES = PLACES + STEPS + PATCHES + TRANSFORMS + UNREACHED


@parameters(CASES)
def test_groups(case: Case) -> None:
    check(case)
