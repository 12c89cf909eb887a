"""benchmarks/manual_cases.py: the experiments in small, and a page that keeps what it said."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "models")]

import manual_cases  # noqa: E402
import own_process  # noqa: E402
import page  # noqa: E402

pytestmark = pytest.mark.usefixtures("quiet_and_quick")


def run(monkeypatch: pytest.MonkeyPatch, *words: str, broken: str = "") -> None:
    """Runs the benchmark with cases that take no time and have two rows each."""

    def at_once(script: str, arguments: list[str], seconds: int) -> dict[str, Any] | str:
        (name,) = (word.partition("=")[2] for word in arguments if word.startswith("--case="))
        return "ValueError: no" if name == broken else {f"{name}{which}": row(name) for which in (" at 0%", " at 80%")}

    monkeypatch.setattr(own_process, "run", at_once)
    monkeypatch.setattr(sys, "argv", ["manual_cases.py", "--data", "nowhere", *words])
    manual_cases.main()


def row(name: str) -> dict[str, str]:
    return {key: f"{name} {key}" for key in manual_cases.KEYS}


def test_a_page_keeps_its_other_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    page.write(out, manual_cases.markdown({"lottery-digits at 50%": row("old"), "vgg16-l1": row("old")}))
    with pytest.raises(SystemExit, match="^vgg16-l1: without a result"):
        run(monkeypatch, "--only", "lottery-digits", "vgg16-l1", "--out", str(out), broken="vgg16-l1")
    found = page.read(out, manual_cases.HEAD, manual_cases.KEYS)
    assert list(found) == ["vgg16-l1", "lottery-digits at 0%", "lottery-digits at 80%"]
    assert found["vgg16-l1"] == row("old") and found["lottery-digits at 80%"] == row("lottery-digits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "vgg"], "--only vgg: is no case. Use some of vgg16-l1"),
        (["--again", "0"], "nothing to train with"),
        (["--images", "100"], "nothing to train with"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert message in capsys.readouterr().err


def test_tickets_stay_good_until_little_is_left() -> None:
    """What the manual reports, on the digits: as good as dense at 80 %, worse at 96 %."""
    from digits import load_split

    images, labels, others, classes = load_split()
    rounds = manual_cases._tickets(64, (images.flatten(1), labels), (others.flatten(1), classes), 25, seed=0)
    gone = [share for share, *_ in rounds]
    assert gone == pytest.approx([1 - 0.04 ** (number / 10) for number in range(11)], abs=1e-3)
    dense, at_80, at_96 = (rounds[number][2] for number in (0, 5, 10))
    assert dense > 95 and at_80 > dense - 1 and at_96 < dense


def test_half_of_seven_layers_is_what_the_paper_reports() -> None:
    """VGG-16-pruned-A has 5.4 M of 15 M parameters, and 34.2 % fewer multiply-accumulates."""
    import vgg16_cifar
    from algorithms_table import size

    from graphprune.pruners import L1NormPruner
    from speedup import ModelSpeedup

    model, example = vgg16_cifar.build_model().eval(), vgg16_cifar.example_inputs()
    macs, params = size(model, example)
    _, masks = L1NormPruner(model, [manual_cases.PRUNED_A], dummy_input=example).compress()
    small = ModelSpeedup(model, example, masks).speedup_model()
    after = size(small, example)
    assert round(params / 1e6, 1) == 15.0 and round(after[1] / 1e6, 1) == 5.4
    assert 1 - after[1] / params == pytest.approx(0.64, abs=5e-4) and 1 - after[0] / macs == pytest.approx(
        0.342, abs=5e-4
    )


def test_without_the_weights(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"holds no {manual_cases.CHECKPOINT}"):
        list(manual_cases.amc_resnet56(argparse.Namespace(data=tmp_path)))
