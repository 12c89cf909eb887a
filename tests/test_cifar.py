"""benchmarks/cifar.py: its batches against an independent computation, and a page that is whole or as it was."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import cifar
import cifar_data
import own_process
import page
from algorithms_table import RUNS


def images(count: int) -> torch.Tensor:
    drawn = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return torch.from_numpy(drawn)


def test_crops_and_flips() -> None:
    pictures = images(3)
    index, down, right = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 4, 8, 3]), torch.tensor([8, 4, 1, 0])
    flipped = torch.tensor([False, True, True, False])
    found = cifar_data.cropped(cifar_data.padded(pictures), index, down, right, flipped)
    assert found.dtype == torch.uint8
    for crop, at, top, left, turned in zip(found, index, down, right, flipped, strict=True):
        large = np.pad(pictures[at].numpy(), ((4, 4), (4, 4), (0, 0)))
        wanted = large[top : top + 32, left : left + 32]
        assert np.array_equal(crop.numpy(), wanted[:, ::-1] if turned else wanted)


def test_pixels_are_normalised() -> None:
    pictures = images(2)
    found = cifar_data.normalised(pictures)
    assert found.shape == (2, 3, 32, 32) and found.is_contiguous(memory_format=torch.channels_last)
    for channel, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        wanted = (pictures[..., channel].numpy() / 255 - mean) / std
        np.testing.assert_allclose(found[:, channel].numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_batches_are_drawn_anew_and_keep_their_labels() -> None:
    pictures, labels = images(6), torch.tensor([3, 1, 4, 1, 5, 9])
    batch = cifar_data.augmented(pictures, labels)
    index = torch.tensor([5, 0, 2])
    (first, targets), (second, _) = batch(index), batch(index)
    assert targets.tolist() == [9, 3, 4] and first.shape == (3, 3, 32, 32) and not torch.equal(first, second)
    torch.manual_seed(0)
    again = batch(index)[0]
    torch.manual_seed(0)
    assert torch.equal(batch(index)[0], again)


def test_accuracy_is_a_share_of_all_images() -> None:
    class Red(torch.nn.Module):
        """Says 1 where an image is red."""

        def forward(self, x):
            red = x.mean((2, 3))[:, 0]
            return torch.stack([-red, red], 1)

    pictures = torch.zeros(7, 32, 32, 3, dtype=torch.uint8)
    pictures[:3, ..., 0] = 255
    labels = torch.tensor([1, 1, 0, 0, 0, 0, 1])
    assert cifar_data.accuracy(pictures, labels, size=3)(Red()) == pytest.approx(100 * 5 / 7)


def test_strips_are_read_in_their_order(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pictures = images(6)
    for number in (1, 0):
        strip = pictures[3 * number : 3 * number + 3].reshape(-1, 32, 3).numpy()
        image.fromarray(strip).save(tmp_path / f"train_00{number}.webp", lossless=True)
    np.save(tmp_path / "train_labels.npy", np.arange(6, dtype=np.uint8))
    found, labels = cifar_data.load(tmp_path, "train")
    assert torch.equal(found, pictures) and labels.tolist() == list(range(6)) and labels.dtype == torch.int64
    np.save(tmp_path / "train_labels.npy", np.arange(5, dtype=np.uint8))
    with pytest.raises(SystemExit, match="holds 6 train images, but 5 labels"):
        cifar_data.load(tmp_path, "train")
    with pytest.raises(SystemExit, match="holds no test_000.webp"):
        cifar_data.load(tmp_path, "test")


def values(name: str) -> dict[str, str]:
    return {key: f"{name} {key}" for key in cifar.KEYS}


def run(monkeypatch: pytest.MonkeyPatch, *words: str, broken: str = "") -> list[str]:
    """Runs the benchmark with runs that take no time, and returns which there were."""
    done = []

    def at_once(script: str, arguments: list[str], seconds: int) -> dict[str, Any] | str:
        (name,) = (word.partition("=")[2] for word in arguments if word.startswith("--row="))
        done.append(name)
        return "ValueError: no" if name == broken else {name: values(name)}

    monkeypatch.setattr(own_process, "run", at_once)
    monkeypatch.setattr(cifar, "check", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--data", "nowhere", *words])
    cifar.main()
    return done


def test_a_page_keeps_its_other_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    assert run(monkeypatch, "--out", str(out)) == list(RUNS)
    assert page.read(out, cifar.HEAD, cifar.KEYS) == {name: values(name) for name in RUNS}
    other = {name: {**values(name), "seed": "7"} for name in reversed(RUNS)}
    page.write(out, cifar.markdown(other))
    assert run(monkeypatch, "--out", str(out), "--only", "slim", "l1") == ["slim", "l1"]
    found = page.read(out, cifar.HEAD, cifar.KEYS)
    assert found == {**other, "slim": values("slim"), "l1": values("l1")} and list(found) == list(RUNS)


def test_a_run_that_fails_leaves_its_row_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    page.write(out, cifar.markdown({"l2": {**values("l2"), "seed": "7"}}))
    with pytest.raises(SystemExit, match="^l2: without a result"):
        run(monkeypatch, "--out", str(out), "--only", "l2", "l1", broken="l2")
    assert page.read(out, cifar.HEAD, cifar.KEYS) == {"l1": values("l1"), "l2": {**values("l2"), "seed": "7"}}


def test_a_page_is_written_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "results.md"
    page.write(out, "first")

    def full(self: Path, text: str) -> int:
        self.write_bytes(text[:2].encode())
        raise OSError("no space left on device")

    with monkeypatch.context() as context:
        context.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            page.write(out, "second")
    assert out.read_text() == "first" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "l3"], "--only l3: is no run. Use some of random, l1"),
        (["--epochs", "0"], "nothing to train with"),
        (["--images", "100"], "nothing to train with"),
        (["--jobs", "0"], "nothing to run with"),
        (["--threads", "0"], "nothing to run with"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert message in capsys.readouterr().err


def test_a_folder_without_the_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"holds no {cifar.CHECKPOINT}. Give the folder"):
        cifar.network(tmp_path)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = {"one": {"a": "x / y", "b": "2"}, "two": {"b": "3"}}
    page.write(tmp_path / "page.md", "\n".join(["Words | more", "", *page.table(("name", "A", "B"), ("a", "b"), rows)]))
    assert page.read(tmp_path / "page.md", ("name", "A", "B"), ("a", "b")) == rows
