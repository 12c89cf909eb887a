"""Products that sum over shared dimensions: y = sum over the contracted letters of the product of the operands.

All of them are one thing: the operands are spread over a common index space, meet there as in a pointwise product,
and the contracted dimensions are summed away. What varies along batch dimensions, and slabs, follow from that.
"""

from collections.abc import Sequence

import numpy as np
import torch

from speedup.flow import Flow
from speedup.labels import Labels, Plane, broadcast, narrowed, settle, support
from speedup.rules.call import Call, Rule

aten = torch.ops.aten


def spread(labels: Labels, letters: Sequence[str], space: Sequence[str]) -> Labels:
    """``labels``, whose dimensions are named ``letters``, as a tensor over ``space``, size 1 where it has no letter."""
    order = sorted(range(len(letters)), key=lambda dim: space.index(letters[dim]))
    present = {letters[dim] for dim in order}
    index = tuple(slice(None) if letter in present else None for letter in space)
    planes = tuple(plane.permute(order)[index] for plane in labels.planes)
    named = dict(zip(letters, labels.shape, strict=True))
    return Labels(tuple(named.get(letter, 1) for letter in space), planes)


def contract(flow: Flow, operands: Sequence[tuple[Labels, Sequence[str]]], out: Sequence[str]) -> Labels:
    """The labels of ``einsum``: operands with their letters, and the letters that stay."""
    letters = list(dict.fromkeys([*out, *(letter for _, names in operands for letter in names)]))
    known: dict[str, int] = {}
    for labels, names in operands:
        for letter, size in zip(names, labels.shape, strict=True):
            known[letter] = max(size, known.get(letter, 1))
    space = [known[letter] for letter in letters]
    met = flow.meet(
        [spread(labels, names, letters) for labels, names in operands],
        space,
        "is multiplied by a tensor whose size is fixed",
    )
    return flow.reduce(met, range(len(out), len(letters)))


def linear(flow: Flow, call: Call) -> Labels:
    """y[..., o] = sum_i x[..., i] W[o, i] + b[o]."""
    x, weight = call["input"], call["weight"]
    lead = [f"x{dim}" for dim in range(len(x.shape) - 1)]
    letters = ["o", "i"] if len(weight.shape) == 2 else ["i"]
    out = contract(flow, [(x, [*lead, "i"]), (weight, letters)], [*lead, *letters[:-1]])
    return flow.meet([out, call["bias"]], call.shape) if call.get("bias") else out


def matmul(flow: Flow, call: Call) -> Labels:
    """y[..., m, n] = sum_k a[..., m, k] b[..., k, n], batch dimensions broadcast."""
    a, b = call.tensors()[:2]
    return flow.meet([product(flow, a, b)], call.shape)


def product(flow: Flow, a: Labels, b: Labels) -> Labels:
    """The labels of ``a @ b``."""
    vector_a, vector_b = len(a.shape) == 1, len(b.shape) == 1
    rank = max(len(a.shape), len(b.shape), 2)
    lead = [f"x{dim}" for dim in range(rank - 2)]
    first = ["k"] if vector_a else [*lead[rank - len(a.shape) :], "m", "k"]
    second = ["k"] if vector_b else [*lead[rank - len(b.shape) :], "k", "n"]
    out = [*lead, *([] if vector_a else ["m"]), *([] if vector_b else ["n"])]
    return contract(flow, [(a, first), (b, second)], out)


def addmm(flow: Flow, call: Call) -> Labels:
    """y = c + a @ b."""
    c, a, b = call.tensors()
    return flow.meet([c, product(flow, a, b)], call.shape)


def einsum(flow: Flow, call: Call) -> Labels:
    """y = einsum(equation, operands), without letters that an operand repeats; otherwise everything is pinned."""
    equation = str(call["equation"])
    operands: list[Labels] = call["tensors"]
    names, out = einsum_letters(equation, [len(operand.shape) for operand in operands])
    if any(len(set(word)) < len(word) for word in names):
        for operand in operands:
            flow.pin_all(operand, f"goes through einsum {equation!r}, which takes a diagonal")
        return Labels(call.shape)
    return flow.meet([contract(flow, list(zip(operands, names, strict=True)), out)], call.shape)


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """The names of the dimensions of each operand of an einsum, and of those of its output.

    An ellipsis stands for ..0, ..1 and so on, counted from the right: the shorter one broadcasts. Without an arrow the
    output has the ellipsis, and in the order of the alphabet each letter that stands once.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    words = inputs.split(",")
    hidden = [rank - len(word.replace("...", "")) for word, rank in zip(words, ranks, strict=True)]
    dots = [[f"..{place}" for place in reversed(range(count))] for count in hidden]
    widest = max((some for some, word in zip(dots, words, strict=True) if "..." in word), key=len, default=[])
    if not arrow:
        joined = "".join(words).replace(".", "")
        output = "..." + "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))
    return [_letters(word, some) for word, some in zip(words, dots, strict=True)], _letters(output, widest)


def _letters(word: str, dots: Sequence[str]) -> list[str]:
    before, ellipsis, after = word.partition("...")
    return [*before, *(dots if ellipsis else ()), *after]


def bilinear(flow: Flow, call: Call) -> Labels:
    """y[..., o] = sum_ij a[..., i] W[o, i, j] b[..., j] + c[o]."""
    a, b = call["input1"], call["input2"]
    lead = [f"x{dim}" for dim in range(len(a.shape) - 1)]
    out = contract(flow, [(a, [*lead, "i"]), (b, [*lead, "j"]), (call["weight"], "oij")], [*lead, "o"])
    return flow.meet([out, call["bias"]], call.shape) if call.get("bias") else out


def distances(flow: Flow, call: Call) -> Labels:
    """y[..., m, n] = (sum_k |a[..., m, k] - b[..., n, k]| ** p) ** (1 / p), batch dimensions broadcast."""
    a, b = call.tensors()
    rank = max(len(a.shape), len(b.shape))
    lead = [f"x{dim}" for dim in range(rank - 2)]
    names = [[*lead[rank - len(x.shape) :], letter, "k"] for x, letter in ((a, "m"), (b, "n"))]
    return flow.meet([contract(flow, list(zip((a, b), names, strict=True)), [*lead, "m", "n"])], call.shape)


def similarity(flow: Flow, call: Call) -> Labels:
    """y = sum of a b over ``dim``, divided by the lengths of a and b."""
    a, b = call.tensors()
    shape = np.broadcast_shapes(a.shape, b.shape)
    return flow.reduce(flow.meet([a, b], shape), [call.dim(len(shape))])


def grouped_matmul(flow: Flow, call: Call) -> Labels:
    """y[t, n] = sum_k x[t, k] W[e(t), k, n]: which expert e takes a token t is known only when the data are."""
    x, weight = call.tensors()[:2]
    if len(x.shape) != 2 or len(weight.shape) != 3:
        flow.pin_all(x, "goes through a grouped product that is not one of tokens with experts")
        flow.pin_all(weight, "goes through a grouped product that is not one of tokens with experts")
        return Labels(call.shape)
    experts = flow.freeze(weight, [0], "is an expert that the data choose", structural=True)
    one = Labels(weight.shape[1:], tuple(plane[0] for plane in experts.planes))
    return contract(flow, [(x, ["t", "k"]), (one, ["k", "n"])], ["t", "n"])


def convolution(flow: Flow, call: Call) -> Labels:
    """y[b, (g, o), ...] = sum_i x[b, (g, i), ...] * W[(g, o), i, ...]: groups are a batch dimension, space is free."""
    return _convolved(flow, call, transposed=False)


def transposed_convolution(flow: Flow, call: Call) -> Labels:
    """y[b, (g, o), ...] = sum_i x[b, (g, i), ...] * W[(g, i), o, ...], spread over space."""
    return _convolved(flow, call, transposed=True)


def _convolved(flow: Flow, call: Call, transposed: bool) -> Labels:
    x, weight, groups = call["input"], call["weight"], int(call["groups"])
    rank = len(weight.shape)
    if not isinstance(call.raw("groups"), int):
        for tensor in call.tensors():
            flow.pin_all(tensor, "goes through a convolution whose groups depend on the batch")
        return Labels(call.shape)
    x = _channels(flow, broadcast(x, (1,) * (rank - len(x.shape)) + x.shape), "varies over the space of a convolution")
    weight = _channels(flow, weight, "is a kernel dimension", structural=True)
    batch, channels = x.shape
    first, second = weight.shape
    inputs = _viewed(x, (batch, groups, channels // groups))
    outer, inner = ("i", "o") if transposed else ("o", "i")
    joint = [plane for plane in weight.planes if len(support(plane)) == 2]
    if joint:
        carried = (flow.mint((groups, second), [0, 1]),) if transposed else tuple(p[0] for p in inputs.planes)
        _tie_joint(flow, joint[0].reshape(groups, -1, second), carried)
        rest = Labels((first, 1), tuple(plane[:, :1] for plane in weight.planes if plane is not joint[0]))
        operands = [(_viewed(rest, (groups, first // groups)), ["g", outer])]
        operands += [(Labels((groups, second), carried), ["g", "o"])] if transposed else []
    else:
        operands = [(_viewed(weight, (groups, first // groups, second)), ["g", outer, inner])]
    out = contract(flow, [(inputs, ["b", "g", "i"]), *operands], ["b", "g", "o"])
    y = _viewed(out, (batch, out.shape[1] * out.shape[2]))
    y = Labels(y.shape, tuple(settle(plane) for plane in y.planes))  # of equal groups it is a copy
    if call.get("bias"):
        y = flow.meet([y, call["bias"]], y.shape)
    planes = [plane[(..., *(None,) * (rank - 2))] for plane in y.planes]
    return Labels(
        call.shape, tuple((plane if len(call.shape) == rank else plane[0]).expand(call.shape) for plane in planes)
    )


def _tie_joint(flow: Flow, joint: Plane, carried: Sequence[Plane]) -> None:
    """Gives every element of a grouped weight, shape (groups, outer, inner), the label carried at (group, inner)."""
    for plane in carried:
        flow.unite(joint, plane[:, None].expand(joint.shape))
    if not carried:
        flow.pin(joint, "is multiplied by a tensor whose size is fixed")


def _channels(flow: Flow, labels: Labels, reason: str, structural: bool = False) -> Labels:
    """The first two dimensions of ``labels``; the others must stay as they are."""
    frozen = flow.freeze(labels, range(2, len(labels.shape)), reason, structural)
    planes = [plane.flatten(2)[..., 0] if plane.dim() > 2 else plane for plane in frozen.planes]
    return Labels(labels.shape[:2], tuple(planes))


def _viewed(labels: Labels, shape: tuple[int, ...]) -> Labels:
    return Labels(shape, tuple(plane.reshape(shape) for plane in labels.planes))


def attention(flow: Flow, call: Call) -> Labels:
    """y = softmax(q k^T * scale + mask) v, over heads (batch), queries and keys (fixed) and the width of a head."""
    q, k, v = call["query"], call["key"], call["value"]
    if call.get("enable_gqa"):
        k, v = (_repeated(labels, q.shape[-3]) for labels in (k, v))
    rank = len(q.shape)
    lead = [f"x{dim}" for dim in range(rank - 2)]
    scores = contract(flow, [(q, [*lead, "m", "k"]), (k, [*lead, "n", "k"])], [*lead, "m", "n"])
    if call.get("attn_mask"):
        scores = flow.meet([scores, call["attn_mask"]], scores.shape)
    scores = flow.freeze(scores, [rank - 2, rank - 1], "is a position in attention")
    return flow.meet(
        [contract(flow, [(scores, [*lead, "m", "n"]), (v, [*lead, "n", "o"])], [*lead, "m", "o"])], call.shape
    )


def _repeated(labels: Labels, heads: int) -> Labels:
    dim = len(labels.shape) - 3
    shape = (*labels.shape[:dim], heads, *labels.shape[dim + 1 :])
    rounds = heads // labels.shape[dim]
    planes = (narrowed(p, [dim]).repeat_interleave(rounds, dim) for p in labels.planes)
    return Labels(shape, tuple(settle(plane.expand(shape)) for plane in planes))


def distance(flow: Flow, call: Call) -> Labels:
    """y = the norm of a - b + eps over the last dimension."""
    if call["p"] < 0:
        for tensor in call.tensors():
            flow.pin_all(tensor, "goes through a norm of negative order over its channels")
        return Labels(call.shape)
    met = flow.meet(call.tensors(), np.broadcast_shapes(*(tensor.shape for tensor in call.tensors())))
    return flow.reduce(met, [len(met.shape) - 1], bool(call["keepdim"]))


_MATMULS = (
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.vdot.default,
)

RULES = {
    aten.linear.default: Rule("contraction", linear),
    **dict.fromkeys(_MATMULS, Rule("contraction", matmul)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), Rule("contraction", addmm)),
    aten._grouped_mm.default: Rule("contraction", grouped_matmul),
    aten.einsum.default: Rule("contraction", einsum),
    aten.bilinear.default: Rule("contraction", bilinear),
    aten.cdist.default: Rule("contraction", distances),
    aten.cosine_similarity.default: Rule("contraction", similarity),
    aten.pairwise_distance.default: Rule("contraction", distance),
    **dict.fromkeys(
        (
            aten.conv1d.default,
            aten.conv2d.default,
            aten.conv3d.default,
            aten.conv1d.padding,
            aten.conv2d.padding,
            aten.conv3d.padding,
        ),
        Rule("convolution", convolution),
    ),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
        Rule("convolution", transposed_convolution),
    ),
    aten.scaled_dot_product_attention.default: Rule("attention", attention),
}

FOREIGN = {"transformers::grouped_mm_fallback": Rule("contraction", grouped_matmul)}
