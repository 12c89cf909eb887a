"""What depends on what as tables, in the columns that NNI's dependency tools wrote."""

import csv
import io
import math
from collections.abc import Iterable, Sequence

from torch import nn

from graphprune.dependency import DependencyGraph


def channel_dependencies(dependencies: DependencyGraph) -> str:
    """Returns as CSV which layers lose the same channels: ``Dependency Set, Layers``.

    Norms and layers that only read the channels are not in it. Layers that depend on no other are sets of one.
    """
    rows = [[f"Set {number}", *layers] for number, layers in enumerate(_sets(dependencies), 1)]
    return _csv(["Dependency Set", "Layers"], rows)


def convolution_groups(dependencies: DependencyGraph) -> str:
    """Returns as CSV of what the channels of each convolution have to be a multiple: ``Conv Layer Name, Group``.

    What a layer produces and what it reads are bound to the groups of every convolution on either side.
    """
    model = dependencies.analysis.captured.model
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _CONVOLUTIONS)}
    found = {name: layer.groups for name, layer in layers.items()}
    for group in dependencies.groups:
        inside = {member.module for member in group.members} & layers.keys()
        made = {member.module for member in group.members if member.role == "out"} & inside
        for name in made if group.pin is None else ():
            found[name] = math.lcm(found[name], *(layers[other].groups for other in inside))
    return _csv(["Conv Layer Name", "Group"], [[name, str(count)] for name, count in found.items()])


_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def _sets(dependencies: DependencyGraph) -> Iterable[list[str]]:
    shapes = {name: labels.shape for name, labels in dependencies.analysis.parameters.items()}
    for group in dependencies.groups:
        made = (member for member in group.members if member.role == "out" and len(shapes[member.tensor]) > 1)
        layers = list(dict.fromkeys(member.module or member.tensor for member in made))
        if layers and (group.pin is None or len(layers) > 1):
            yield layers


def _csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
