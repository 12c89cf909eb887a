"""Drawings: the graph of axes and ties, as a file for tools too, and scores by shares."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.etree import ElementTree

from graphprune.dependency import DependencyGraph
from graphprune.errors import ConfigError

_ENDS: tuple[str, ...] = ("id", "source", "target")
_GRAPHML = "http://graphml.graphdrawing.org/xmlns"


def write_graph(dependencies: DependencyGraph, path: Path) -> None:
    """Writes the graph in the format that the suffix of ``path`` names: .dot, .graphml, .json or .svg.

    Nodes are axes (tensor, dimension, group), edges are ties with their kind and the graph node that made them.

    Raises:
        ConfigError: The suffix is none of these, the file cannot be written, or .svg is asked for without matplotlib.
    """
    writer = WRITERS.get(path.suffix)
    if writer is None:
        raise ConfigError(f"{path}: no format has the suffix {path.suffix!r}. Use one of {', '.join(WRITERS)}.")
    try:
        writer(dependencies, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}). Name another file.") from error


def _elements(dependencies: DependencyGraph) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The axes and the ties as plain data; ties name their axes by ``id``."""
    graph = dependencies.graph
    ids = {axis: f"n{index}" for index, axis in enumerate(graph.nodes)}
    pins = {group.index: group.pin for group in dependencies.groups}
    nodes = [{"id": ids[axis], **facts, "pin": pins[facts["group"]] or ""} for axis, facts in graph.nodes(data=True)]
    edges = [{"source": ids[one], "target": ids[other], **facts} for one, other, facts in graph.edges(data=True)]
    return nodes, edges


def _tied(dependencies: DependencyGraph) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same without what stands alone, kernel sizes above all, which nobody wants to look at."""
    nodes, edges = _elements(dependencies)
    ends = {edge[end] for edge in edges for end in ("source", "target")}
    groups = {node["group"] for node in nodes if node["id"] in ends}
    return [node for node in nodes if node["group"] in groups], edges


def _write_json(dependencies: DependencyGraph, path: Path) -> None:
    nodes, edges = _elements(dependencies)
    path.write_text(json.dumps({"nodes": nodes, "edges": edges}, indent=1), encoding="utf-8")


def _write_dot(dependencies: DependencyGraph, path: Path) -> None:
    nodes, edges = _tied(dependencies)
    lines = ["graph dependencies {", "  node [shape=box, fontname=sans];"]
    for group in dependencies.groups:
        inside = [node for node in nodes if node["group"] == group.index]
        if not inside:
            continue
        lines += [
            f"  subgraph cluster_{group.index} {{",
            f"    label={_quoted(_title(group.name, group.units, group.pin))};",
        ]
        lines += [f"    {node['id']} [label={_quoted(_axis(node))}];" for node in inside]
        lines.append("  }")
    lines += [f"  {edge['source']} -- {edge['target']} [label={_quoted(edge['kind'])}];" for edge in edges]
    path.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")


def _axis(node: Mapping[str, Any]) -> str:
    return f"{node['tensor']} [{node['dim']}]"


def _title(name: str, units: int, pin: str | None) -> str:
    return f"{name}: {units} units{f', pinned: {pin}' if pin else ''}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # as in DOT, backslashes and quotes are escaped by a backslash


def _write_graphml(dependencies: DependencyGraph, path: Path) -> None:
    nodes, edges = _elements(dependencies)
    root = ElementTree.Element("graphml", xmlns=_GRAPHML)
    for owner, elements in (("node", nodes), ("edge", edges)):
        for key in dict.fromkeys(key for element in elements for key in element if key not in _ENDS):
            kind = "long" if all(isinstance(element[key], int) for element in elements) else "string"
            ElementTree.SubElement(
                root, "key", {"id": f"{owner}_{key}", "for": owner, "attr.name": key, "attr.type": kind}
            )
    graph = ElementTree.SubElement(root, "graph", edgedefault="undirected")
    for owner, elements in (("node", nodes), ("edge", edges)):
        for element in elements:
            ends: dict[str, str] = {key: element[key] for key in _ENDS if key in element}
            node = ElementTree.SubElement(graph, owner, ends)
            for key, value in element.items():
                if key not in ends:
                    ElementTree.SubElement(node, "data", key=f"{owner}_{key}").text = str(value)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def check_plot(path: Path) -> None:
    """Refuses what :func:`plot_scores` could not draw to.

    Raises:
        ConfigError: The suffix names no format, or matplotlib is missing.
    """
    known = _matplotlib("figure", path).Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ConfigError(f"{path}: no plot has the suffix {path.suffix!r}. Use .svg, .png or .pdf.")


def plot_scores(dense: float, scores: Mapping[str, Mapping[float, float]], path: Path) -> None:
    """Draws the score of a model against the share that goes of one channel group, a line for each group.

    Raises:
        ConfigError: The suffix names no format, the file cannot be written, or matplotlib is missing.
    """
    check_plot(path)
    figure = _matplotlib("figure", path).Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="share of the channels that goes", ylabel="score")
    for name, row in scores.items():
        axes.plot([0.0, *row], [dense, *row.values()], marker=".", label=name)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error}). Name another file.") from error


def _matplotlib(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise ConfigError(
            f"{path}: drawing needs matplotlib. Install it with pip install 'graphprune[plot]'."
        ) from error


def _write_svg(dependencies: DependencyGraph, path: Path) -> None:
    """One row for each group: its axes in the order of the model, ties as arcs coloured by kind."""
    figures, patches = _matplotlib("figure", path), _matplotlib("patches", path)
    nodes, edges = _tied(dependencies)
    rows: dict[int, list[str]] = {}
    for node in nodes:
        rows.setdefault(node["group"], []).append(node["id"])
    place: dict[str, tuple[float, float]] = {}
    depth = 0.0
    for row in rows.values():
        depth += 1.5 + 0.15 * len(row)
        place |= {one: (x, -depth) for x, one in enumerate(row)}
    width = max((len(row) for row in rows.values()), default=1)
    figure = figures.Figure(figsize=(4 + 0.5 * width, 1 + 0.5 * depth))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-7, width + 1), ylim=(-depth - 2, 0))
    axes.axis("off")
    kinds = list(dict.fromkeys(edge["kind"] for edge in edges))
    for edge in edges:
        ends = (place[edge["source"]], place[edge["target"]])
        color = f"C{kinds.index(edge['kind']) % 10}"
        axes.add_patch(
            patches.FancyArrowPatch(
                *ends, connectionstyle="arc3,rad=-0.3", arrowstyle="-", shrinkA=0, shrinkB=0, color=color
            )
        )
    for node in nodes:
        x, y = place[node["id"]]
        axes.plot(x, y, "o", color="silver" if node["pin"] else "black", markersize=4)
        axes.text(x, y - 0.15, _axis(node), fontsize=5, rotation=-30, rotation_mode="anchor", va="top")
    for group in dependencies.groups:
        if group.index in rows:
            title = _title(group.name, group.units, group.pin).replace(": ", ":\n")
            axes.text(-0.5, place[rows[group.index][0]][1], title, fontsize=6, ha="right", va="center")
    handles = [patches.Patch(color=f"C{index % 10}", label=kind) for index, kind in enumerate(kinds)]
    axes.legend(handles=handles, loc="upper right", fontsize=7)
    figure.savefig(path, format="svg")


WRITERS: Mapping[str, Callable[[DependencyGraph, Path], None]] = MappingProxyType(
    {".dot": _write_dot, ".graphml": _write_graphml, ".json": _write_json, ".svg": _write_svg}
)
"""Suffix -> what writes that format."""
