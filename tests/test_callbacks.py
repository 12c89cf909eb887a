"""The callbacks with the real libraries: two short epochs on the CPU."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphprune.errors import ConfigError
from graphprune.training.callbacks import lightning_callback, transformers_callback

pytestmark = pytest.mark.usefixtures("quiet_and_quick")

X = torch.linspace(-1, 1, 40).reshape(10, 4)
Y = X[:, :2].argmax(1)


class Masking:
    """Notes its calls, and masks two channels of a weight at the beginning and the end of each batch."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.calls: list[object] = []
        self.seen: list[bool] = []
        layer.register_forward_pre_hook(lambda *_: self.seen.append(not bool(layer.weight[:2].any())))

    def on_epoch_begin(self, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def on_batch_begin(self, step: int) -> None:
        self.calls.append(step)
        self._mask()

    def on_batch_end(self) -> None:
        self.calls.append("end")
        self._mask()

    def on_epoch_end(self) -> None:
        self.calls.append("done")

    def _mask(self) -> None:
        with torch.no_grad():
            self.layer.weight[:2] = 0


def told(epochs: int, batches: int) -> list[object]:
    inside = [word for step in range(batches) for word in (step, "end")]
    return [word for epoch in range(epochs) for word in (f"epoch {epoch}", *inside, "done")]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


# --- Lightning --------------------------------------------------------------------------------------------------------

NAMES = ("pytorch_lightning", "lightning.pytorch")


def lightning(name: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def fit_with_lightning(library, hooks_of, batches=slice(None), **options):
    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch, index) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    hooks = hooks_of(module.net[0])
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [lightning_callback(hooks)] if isinstance(hooks, Masking) else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = library.Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **quiet, **options)
        trainer.fit(module, DataLoader(TensorDataset(X, Y), 2, shuffle=False))
    return module.net, hooks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=["each", "accumulated"])
def test_lightning(name: str, options) -> None:
    model, hooks = fit_with_lightning(lightning(name), Masking, **options)
    assert hooks.calls == told(2, 5)
    assert hooks.seen == [True] * 10 and not model[0].weight[:2].any()
    free, _ = fit_with_lightning(lightning(name), lambda layer: None, **options)
    assert free[0].weight[:2].all() and not torch.equal(free[2].weight, model[2].weight)


def test_lightning_ends_inside_an_epoch() -> None:
    _, hooks = fit_with_lightning(lightning("pytorch_lightning"), Masking, max_steps=3)
    assert hooks.calls == ["epoch 0", 0, "end", 1, "end", 2, "end", "done"]


# --- transformers -----------------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.net(x)
        return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}


def train_with_transformers(folder: Path, masked: bool = True, resume: str | None = None, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = WithLoss()
    hooks = Masking(model.net[0])
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=0.1,
        **{"save_strategy": "no", "logging_strategy": "no", **options},
    )
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    callbacks = [transformers_callback(hooks)] if masked else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=resume)
    return model.net, hooks


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["each", "accumulated"])
def test_transformers(tmp_path: Path, options) -> None:
    model, hooks = train_with_transformers(tmp_path, **options)
    assert hooks.calls == told(2, 5)
    assert hooks.seen == [True] * 10 and not model[0].weight[:2].any()
    free, _ = train_with_transformers(tmp_path, masked=False, **options)
    assert free[0].weight[:2].all() and not torch.equal(free[2].weight, model[2].weight)


def test_transformers_resumes_inside_an_epoch(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    _, hooks = train_with_transformers(tmp_path, max_steps=2, **saving)
    assert hooks.calls == told(1, 4)
    _, resumed = train_with_transformers(tmp_path, resume=str(tmp_path / "checkpoint-2"), **saving)
    assert resumed.calls == ["epoch 0", 4, "end", "done", *told(2, 5)[12:]]


# --- none of them -----------------------------------------------------------------------------------------------------


def test_a_library_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = Masking(nn.Linear(4, 4))
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=r"transformers: is not installed. Run pip install 'graphprune\[transformers\]'"
    ):
        transformers_callback(hooks)
    with pytest.raises(ConfigError, match=r"lightning: is not installed. Run pip install 'graphprune\[lightning\]'"):
        lightning_callback(hooks)


def test_they_are_imported_when_they_are_used() -> None:
    code = "import graphprune.training.callbacks, sys; print([m for m in ('transformers', 'pytorch_lightning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("make", [lightning_callback, transformers_callback])
def test_what_is_no_hooks_is_refused(make) -> None:
    class Half:
        def on_epoch_begin(self, epoch: int) -> None: ...

    for hooks, fact in ((5, "5 has no on_epoch_begin"), (Half(), "has no on_batch_begin")):
        with pytest.raises(ConfigError, match=rf"hooks: .*{fact}\. Give an object with on_epoch_begin, on_batch_begin"):
            make(hooks)
