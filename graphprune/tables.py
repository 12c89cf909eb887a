"""Plain data as tables to print."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from graphprune.report import Report

_LONGEST = 40
"""Rows of a table that are printed after a compression; the report has all of them."""

_FILES = {
    "model.onnx": "the shrunk model for onnxruntime",
    "model.pt2": "the shrunk model for torch.export.load",
    "dense.onnx": "the original, for comparison",
    "dense.pt2": "the original as it was captured, for graphprune verify",
    "plan.json": "what was kept; with the weights it is all that graphprune.load needs",
    "weights.safetensors": "the weights that were kept",
    "report.json": "everything measured",
}


_ONNX = "model.onnx"
_OF_CHECKPOINTS = {name: _FILES[name] for name in ("plan.json", "report.json")}


def compression(report: Report, folder: Path) -> RenderableType:
    """Returns what a compression did, what was proven and where everything is."""
    pruned = report.get("pruning")
    parts: list[RenderableType] = [_zeros(pruned) if pruned else _groups(report["groups"]), _summary(report)]
    notes = (*_captured(report), *_left_alone(report), _form(report), _proof(report))
    if pruned:
        zeros, all_of_them = pruned["zeros"], pruned["parameters"]
        notes = (f"Zero: {zeros} of {all_of_them} parameters. No channel went: the dense files are pruned too.", *notes)
    parts += [Padding(Text(note), (0, 1)) for note in notes]
    parts += [Padding(Text(f"Note: {note}"), (0, 1)) for note in _warnings(report)]
    return Group(*parts, _files({name: file["bytes"] for name, file in report["files"].items()}, folder))


def channel_groups(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Returns the channel groups of a model as a table."""
    table = _table("channel group", "kind", ">units", ">width", ">members", "tied by", "pinned")
    for row in rows:
        ties = ", ".join(f"{kind} {count}" for kind, count in row["ties"].items())
        locked = row["units"] - row["prunable"]
        pin = row["pin"] or (f"{locked} of its units" if locked else "")
        cells = (row["name"], row["kind"], row["units"], row["unit_width"], len(row["members"]), ties, pin)
        table.add_row(*(escape(str(cell)) for cell in cells))
    free = sum(row["pin"] is None for row in rows)
    return Group(table, Padding(Text(f"{len(rows)} channel groups, {free} of which can shrink."), (0, 1)))


def sensitivities(dense: float, scores: Mapping[str, Mapping[float, float]]) -> RenderableType:
    """Returns the score at each share of each group as a table."""
    shares = list(dict.fromkeys(share for row in scores.values() for share in row))
    table = _table("channel group", *(f">{share:g}" for share in shares))
    for name, row in scores.items():
        table.add_row(escape(name), *(f"{row[share]:.4g}" if share in row else "" for share in shares))
    return Group(table, Padding(Text(f"The score of the whole model is {dense:.4g}."), (0, 1)))


def findings(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Returns what was proven, line by line."""
    table = _table("proven", "")
    for subject, fact in rows:
        table.add_row(escape(subject), escape(fact))
    return table


def latencies(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Returns the rows of a benchmark as a table."""
    table = _table("model", "role", ">p50 ms", ">p90 ms", ">min ms", ">runs", ">speed-up", "95 % interval")
    for row in rows:
        table.add_row(
            escape(str(row["model"])),
            str(row["role"]),
            *(f"{row[key]:.3f}" for key in ("p50_ms", "p90_ms", "min_ms")),
            str(row["runs"]),
            f"{row['speedup']:.3f}x",
            f"{row['speedup_low']:.3f} to {row['speedup_high']:.3f}",
        )
    return table


def operator_times(model: str, rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Returns where the time of a model goes."""
    table = _table(escape(model), ">nodes", ">ms", ">share")
    for row in rows:
        table.add_row(str(row["operator"]), str(row["nodes"]), f"{row['ms']:.3f}", f"{100 * row['share']:.1f} %")
    return table


def _table(*headings: str) -> Table:
    """A table with these columns; those whose heading begins with > are aligned to the right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=True)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def _groups(groups: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table("channel group", ">units", ">asked", ">kept", "note")
    for group in groups[:_LONGEST]:
        kept = Text(str(group["kept"]), style="bold" if group["kept"] < group["units"] else "")
        note = escape(group["note"] or "")
        table.add_row(escape(group["name"]), str(group["units"]), str(group["asked"]), kept, note)
    if len(groups) > _LONGEST:
        table.add_row(f"and {len(groups) - _LONGEST} more, in report.json")
    return table


def _zeros(pruning: Mapping[str, Any]) -> RenderableType:
    """The tensors in which single weights were made zero."""
    table = _table("tensor", ">elements", ">zeros", ">share", ">asked")
    rows = pruning["tensors"]
    for row in rows[:_LONGEST]:
        share = row["zeros"] / row["elements"]
        table.add_row(escape(row["name"]), str(row["elements"]), str(row["zeros"]), f"{share:.4f}", f"{row['asked']:g}")
    if len(rows) > _LONGEST:
        table.add_row(f"and {len(rows) - _LONGEST} more, in report.json")
    return table


def _summary(report: Report) -> RenderableType:
    table = _table("", ">dense", ">shrunk", ">ratio", "95 % interval")
    for name, key in (("parameters", "params"), ("MACs of one example", "macs")):
        change = report[key]
        table.add_row(
            name, _short(change["dense"]), _short(change["shrunk"]), _times(change["dense"], change["shrunk"])
        )
    if "checkpoint" in report:
        sizes = report["checkpoint"]["bytes"]
        what, dense, small = "weights", sizes["dense"], sizes["shrunk"]
    else:
        dense, small = (report["files"][name]["bytes"] for name in ("dense.onnx", "model.onnx"))
        what = "ONNX file"
    table.add_row(what, _bytes(dense), _bytes(small), _times(dense, small))
    if report["latency"]:
        before, after = report["latency"]["models"]
        ratio = after["speedup"]
        table.add_row(
            "latency",
            f"{before['p50_ms']:.3g} ms",
            f"{after['p50_ms']:.3g} ms",
            f"{ratio['median']:.2f}x",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}",
        )
    if report["accuracy"]:
        table.add_row("accuracy", *(f"{report['accuracy'][key]:.2f}" for key in ("dense", "shrunk")))
    return table


def _left_alone(report: Report) -> list[str]:
    """One sentence for each reason why groups kept all of their channels."""
    reasons = Counter(pinned["reason"] for pinned in report["pinned"])
    first = {pinned["reason"]: pinned["name"] for pinned in reversed(report["pinned"])}
    return [
        f"Left alone: {first[reason]}{f' and {count - 1} more' if count > 1 else ''}: {reason}."
        for reason, count in reasons.most_common(8)
    ]


def _captured(report: Report) -> list[str]:
    """Which parts were captured, and what stopped the rest, of a model that is captured in parts."""
    if not report["parts"]:
        return []
    paths = report["parts"]["captured"]
    more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
    return [
        f"Captured in parts: {', '.join(paths[:8])}{more}. The rest, {_short(report['parts']['parameters_outside'])} "
        f"parameters, runs as it is. {report['parts']['stopped']['']}",
        "The files for onnxruntime and torch.export hold the parts side by side, each with its own inputs and outputs.",
    ]


def _form(report: Report) -> str:
    result = report["result"]
    if result["form"] == "module":
        changed = "".join(f", {r['module']}.{r['attribute']}: {r['old']} -> {r['new']}" for r in result["repairs"][:3])
        more = f" and {len(result['repairs']) - 3} more attributes" if len(result["repairs"]) > 3 else ""
        return f"Result: an instance of {report['source']['class']}{changed}{more}."
    return f"Result: the rewritten graph, because of {result['obstacle']}."


def _proof(report: Report) -> str:
    proof = report["proof"]
    if proof is None:
        return "Not proven: the shapes follow from the plan; nothing was computed, as was asked (--no-proof)."
    return (
        f"Proven: all {proof['nodes']} nodes of the shrunk graph equal those of the masked original "
        f"(difference {proof['difference']:.1g}, allowed {proof['tolerance']:.0e})."
    )


def _warnings(report: Report) -> list[str]:
    missed = [f"{report['note']}."] if report["note"] else []
    unused = (
        missed
        + _of_config(report)
        + [f"{name} is used by no forward and stays as it is." for name in report["unused"][:3]]
    )
    exported = [f"{name}: {one['note']}" for name, one in report["exports"].items() if one["note"]]
    return unused + exported + list(report["latency"]["warnings"] if report["latency"] else ())


def _of_config(report: Report) -> list[str]:
    """What became of the config.json of a checkpoint."""
    config = report.get("checkpoint", {}).get("config")
    if not config:
        return []
    if config["written"]:
        changed = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in config["changed"].items())
        return [f"config.json: {changed or 'as it was'}."]
    return [f"there is no new config.json, because {config['reason']}. graphprune.load builds the model."]


def _files(sizes: Mapping[str, int], folder: Path) -> RenderableType:
    table = _table(escape(f"{folder}/"), ">size", "")
    purposes = _FILES if _ONNX in sizes else {**dict.fromkeys(sizes, ""), **_OF_CHECKPOINTS}
    for name, purpose in purposes.items():
        table.add_row(escape(name), _bytes(sizes[name]) if name in sizes else "", purpose)
    return table


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(int(number))


def _bytes(size: float) -> str:
    return f"{_short(size)}B" if size >= 1e3 else f"{int(size)} B"


def _times(dense: float, small: float) -> str:
    return f"{dense / small:.2f}x" if small else ""
