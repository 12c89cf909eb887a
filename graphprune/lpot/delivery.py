"""From a source and a configuration file of LPOT to a folder. Whole or not at all."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from graphprune.compress import Progress
from graphprune.config import Request
from graphprune.deliver import Delivery, deliver
from graphprune.folder import check_free
from graphprune.lpot.pruning import Pruning
from graphprune.source import InTraining, Source
from graphprune.training.loop import Loop
from speedup.capture import capture
from speedup.latency import DEFAULT_LIMITS, Limits


def deliver_pruned(
    source: Source,
    folder: Path,
    config: Path,
    *,
    seed: int = 0,
    strict: bool = False,
    force: bool = False,
    opset: int | None = None,
    limits: Limits | None = DEFAULT_LIMITS,
    threads: int | None = None,
    command: Sequence[str] = (),
    progress: Progress = lambda name: None,
) -> Delivery:
    """Trains and prunes a copy of a model as a file of LPOT says, and delivers it with its zeros.

    The folder is that of :func:`~graphprune.deliver.deliver` at sparsity 0: no channel goes, so that all files hold the
    pruned model, ``dense.onnx`` and ``dense.pt2`` as it was captured. Under ``pruning`` the report says how many zeros
    there are; ``accuracy`` compares with the model before it was trained.

    What the file does not say of the training is taken from ``training()`` beside the model: data where it has a loss
    and an optimizer, or everything where it has none of the three.

    Args:
        source: The model; it is not changed.
        folder: Where to put it.
        config: The file.
        seed: Of everything that is random.
        strict: Whether an operator without a rule is an error.
        force: As in :func:`~graphprune.deliver.deliver`, with the rest.
        opset: Of the ONNX files.
        limits: How long to measure latency.
        threads: Of onnxruntime.
        command: The command line, for the report.
        progress: Called with the name of each stage as it begins.

    Raises:
        SpeedupError: The file makes no sense, training went wrong, or one of the stages refused; there is no folder
            then, or what was there before.
    """
    prune = Pruning(config, seed=seed)
    check_free(folder, force=force)
    prune.model = copy.deepcopy(source.model)
    prune.eval_func = source.evaluate
    train, own = prune.config.train, source.training
    if own is not None and (train.criterion, train.optimizer, train.dataloader) == (None, None, None):
        prune.training = own
    elif own is not None and isinstance(own.trainer, Loop) and train.dataloader is None:
        prune.train_dataloader = own.trainer.data
    progress("capture")
    capture(source.model, source.example_inputs)  # what cannot be delivered need not be trained
    before = None
    if source.evaluate is not None:
        progress("evaluate")
        before = source.evaluate(source.model)
    progress("train")
    if prune.training is None and prune.train_dataloader is None:
        pruned = InTraining(str(config), source.folder, prune, "raises while the model is trained as it says")()
    else:
        pruned = source.in_training(prune)()
    return deliver(
        replace(source, model=pruned, evaluate=None),
        folder,
        Request.of(sparsity=0.0, round_to=1, seed=seed, strict=strict),
        force=force,
        opset=opset,
        limits=limits,
        threads=threads,
        command=command,
        progress=progress,
        facts={
            "accuracy": None if before is None else {"dense": before, "shrunk": prune.score},
            "pruning": _said(prune, config),
        },
    )


def _said(prune: Pruning, config: Path) -> Mapping[str, Any]:
    """How many zeros there are, and how training went."""
    assert prune.model is not None and prune.fit is not None
    named = dict(prune.model.named_parameters(remove_duplicate=False))
    tensors = [
        {
            "name": name,
            "elements": named[name].numel(),
            "zeros": int((named[name] == 0).sum()),
            "asked": goal.target,
        }
        for name, goal in prune.goals.items()
    ]
    return {
        "config": str(config),
        "tensors": tensors,
        "parameters": sum(parameter.numel() for parameter in prune.model.parameters()),
        "zeros": sum(int((parameter == 0).sum()) for parameter in prune.model.parameters()),
        "epochs": [asdict(epoch) for epoch in prune.fit.epochs],
    }
