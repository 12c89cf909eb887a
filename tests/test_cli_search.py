"""Rounds, searches, sensitivity and dependency tables on the command line."""

import csv
import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import NET, complaint, run
from test_rules import one_thread

import graphprune
from graphprune.cli import app
from graphprune.search import Episodes, Found, Schedule, Trials, amc, annealing

LEARNS = (
    NET
    + """
from graphprune.training import Training

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = X.mean((2, 3)).argmax(1)

def build_model():
    return Net()

def example_inputs():
    return X[:2]

def evaluate(model):
    with torch.no_grad():
        return -nn.functional.cross_entropy(model(X), Y).item()

def training():
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]
    return Training.on(batches, nn.functional.cross_entropy, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2))
"""
)

TWO = LEARNS.replace(
    "self.head = nn.Linear(width, 4)", "self.neck, self.head = nn.Linear(width, 8), nn.Linear(8, 4)"
).replace(
    "self.head((x + self.body(x).relu()).mean((2, 3)))", "self.head(self.neck((x + self.body(x).relu()).mean((2, 3))))"
)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in that holds a model that can be trained, and one that cannot."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(LEARNS)
    (tmp_path / "plain.py").write_text(NET + "def example_inputs():\n    return torch.randn(2, 3, 6, 6)\n")
    with one_thread():
        yield tmp_path


def report(*words: object, model: str = "net.py") -> dict[str, object]:
    result = run("compress", model, "--no-bench", "--round-to", "1", "--json", *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def stems(made: dict) -> int:
    return next(group["kept"] for group in made["groups"] if group["name"] == "stem.weight")


def test_training_after_the_shrink_is_proven_and_verified(place: Path) -> None:
    trained, plain = report("--epochs", 4), report("--out", "plain")
    assert stems(trained) == stems(plain) == 16
    assert trained["accuracy"]["dense"] == plain["accuracy"]["dense"] < trained["accuracy"]["shrunk"]
    assert run("verify", "net-pruned").exit_code == 0
    namespace: dict = {}
    exec(LEARNS, namespace)
    loaded = graphprune.load(place / "net-pruned", namespace["Net"]())
    assert namespace["evaluate"](loaded.eval()) == pytest.approx(trained["accuracy"]["shrunk"], rel=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "agp", "lottery_ticket"])
def test_rounds_end_where_they_should(schedule: str) -> None:
    made = report("--schedule", schedule, "--rounds", 3, "--epochs", 1, "--sparsity", 0.75)
    assert stems(made) == 8 and made["proof"]["difference"] < 1e-9


@pytest.mark.parametrize("words", [("--epochs", 1), ("--schedule", "agp", "--rounds", 2)])
def test_rounds_say_what_was_asked_and_what_rounding_made_of_it(words: tuple[object, ...]) -> None:
    rounded = report("--round-to", 16, "--sparsity", 0.3, *words)
    at_once = report("--round-to", 16, "--sparsity", 0.3, "--out", "at_once")
    shown = [[(group["asked"], group["kept"]) for group in made["groups"]] for made in (rounded, at_once)]
    assert shown[0] == shown[1] and shown[0] == [(22, 16)]
    told = complaint(run("compress", "net.py", "--no-bench", "--round-to", 32, "--out", "none", *words))
    assert told.startswith("model: nothing can be pruned (kept 32, not 16: a multiple of 32).")


def test_amc_rounds_as_it_is_told() -> None:
    made = report("--search", "amc", "--round-to", 8, "--sparsity", 0.3)
    assert stems(made) % 8 == 0
    assert "a multiple of 32" in complaint(
        run("compress", "net.py", "--search", "amc", "--round-to", 32, "--out", "no")
    )


def test_the_shares_of_a_config_list_hold_in_rounds_and_searches(place: Path) -> None:
    (place / "list.yaml").write_text("- {op_types: [Conv2d], sparsity: 0.25}\n- {op_names: [head], exclude: true}\n")
    for words in (("--epochs", 1), ("--schedule", "agp", "--rounds", 2), ("--search", "autocompress")):
        assert stems(report("--config", "list.yaml", "--force", *words)) == 24
    made = report("--config", "list.yaml", "--force", "--search", "netadapt")
    assert 0.7 * made["macs"]["dense"] < made["macs"]["shrunk"] <= 0.75 * made["macs"]["dense"]


def test_rounds_begin_with_the_initial_sparsity_of_a_list(place: Path) -> None:
    (place / "list.yaml").write_text("- {op_types: [Conv2d], initial_sparsity: 0.5, final_sparsity: 0.75}\n")
    words = ("--config", "list.yaml", "--schedule", "linear", "--rounds", 2, "--journal", "rounds.jsonl")
    assert stems(report(*words)) == 8
    first, last = map(json.loads, (place / "rounds.jsonl").read_text().splitlines()[1:])
    assert first["shares"] == {"stem.weight": 0.625} and last["shares"] == {"stem.weight": 0.75}


def test_a_ranking_of_all_groups_holds_in_rounds(place: Path) -> None:
    (place / "two.py").write_text(TWO)
    words = ("--scope", "global", "--criterion", "taylor")
    once = report(*words, model="two.py")
    rounds = report(*words, "--epochs", 1, "--out", "rounds", model="two.py")
    widths = [[group["kept"] for group in made["groups"]] for made in (once, rounds)]
    assert widths[0] == widths[1] != [16, 4] and rounds["request"]["scope"] == "global"


def test_rounds_go_on_from_their_journal(place: Path) -> None:
    words = ("--schedule", "agp", "--rounds", 2, "--epochs", 1, "--journal", "rounds.jsonl")
    first = report(*words)
    lines = (place / "rounds.jsonl").read_text()
    again = report(*words, "--force")
    assert (place / "rounds.jsonl").read_text() == lines
    assert again["accuracy"] == first["accuracy"] and again["files"]["plan.json"] == first["files"]["plan.json"]


def test_a_journal_is_of_its_epochs_and_its_code(place: Path) -> None:
    words = (
        "compress",
        "net.py",
        "--no-bench",
        "--round-to",
        1,
        "--force",
        "--journal",
        "j.jsonl",
        "--schedule",
        "linear",
    )
    assert run(*words, "--epochs", 1).exit_code == 0
    line = complaint(run(*words, "--epochs", 2))
    assert line.startswith("j.jsonl: is the journal of another search (epochs 1, not 2). Use another file")
    (place / "net.py").write_text(LEARNS + "\n# nothing but a remark\n")
    assert run(*words, "--epochs", 1).exit_code == 0
    (place / "net.py").write_text(LEARNS.replace("lr=1e-2", "lr=1e-3"))
    line = complaint(run(*words, "--epochs", 1))
    assert line.startswith("j.jsonl: is the journal of another search (the code of its model, its training or its eva")


def test_a_journal_is_that_of_a_file_with_another_name(place: Path) -> None:
    words = ("--share", 0.5, "--journal", "j.jsonl")
    assert run("sensitivity", "net.py", *words).exit_code == 0
    before = (place / "j.jsonl").read_text()
    (place / "net.py").rename(place / "renamed.py")
    assert run("sensitivity", "renamed.py", *words).exit_code == 0
    assert run("sensitivity", "renamed:build_model", "--input", "2x3x6x6", *words).exit_code == 0
    sys.modules.pop("renamed")
    assert (place / "j.jsonl").read_text() == before


def test_a_journal_is_of_the_code_that_its_model_imports(place: Path) -> None:
    words = ("sensitivity", "net.py", "--share", 0.5, "--journal", "j.jsonl")
    (place / "net.py").write_text(
        LEARNS.replace("def evaluate(model):", "import factor_of_net\n\ndef evaluate(model):")
    )
    (place / "factor_of_net.py").write_text("FACTOR = 1.0\n")
    assert run(*words).exit_code == 0
    sys.modules.pop("factor_of_net")
    (place / "factor_of_net.py").write_text("FACTOR = 20.0\n")
    assert complaint(run(*words)).startswith("j.jsonl: is the journal of another search (the code of its model")
    sys.modules.pop("factor_of_net")


@pytest.mark.parametrize(
    ("search", "least"),
    [
        ("netadapt", "0.579 stay"),
        ("sensitivity", "0.750 stay"),
        ("autocompress", "0.750 stay"),
        ("annealing", "0.750 stay"),
    ],
)
def test_a_search_that_cannot_reach_its_target_ends_before_it_begins(place: Path, search: str, least: str) -> None:
    words = ("compress", "net.py", "--no-bench", "--round-to", 1, "--search", search, "--sparsity", 0.9)
    line = complaint(run(*words, "--min-channels", 24, "--journal", "j"))
    assert line.startswith("target: 0.100 of the ") and f"may be left, and {least} even where every group gives" in line
    assert not (place / "net-pruned").exists()
    assert not (place / "j").exists() or len((place / "j").read_text().splitlines()) == 1


@pytest.mark.parametrize("search", ["netadapt", "amc", "annealing"])
def test_a_search_for_nothing(search: str) -> None:
    line = complaint(run("compress", "net.py", "--no-bench", "--search", search, "--sparsity", 0))
    assert line == "sparsity 0: leaves nothing to search for. Ask for a share such as 0.5."


def test_a_report_says_what_was_asked() -> None:
    assert report("--search", "netadapt", "--sparsity", 0.3)["request"]["sparsity"] == 0.3
    rounds = report("--schedule", "linear", "--rounds", 2, "--sparsity", 0.3, "--round-to", 16, "--out", "rounds")
    assert rounds["request"]["sparsity"] == 0.3


def test_what_is_read_is_not_replaced(place: Path) -> None:
    words = ("compress", "net.py", "--no-bench", "--round-to", 1)
    assert run(*words).exit_code == 0
    told = "j: is named for something else as well. Name another file."
    for journal, line in (
        ("net-pruned/j", "net-pruned/j: is in net-pruned, which is replaced as a whole. Name another file."),
        ("net.py", told.replace("j:", "net.py:")),
    ):
        assert complaint(run(*words, "--force", "--schedule", "linear", "--journal", journal)) == line
    (place / "net-pruned" / "net.py").write_text(LEARNS)
    line = complaint(run("compress", "net-pruned/net.py", "--no-bench", "--force", "--out", "net-pruned"))
    assert (
        line
        == "net-pruned/net.py: is no part of the compressed model and would be lost. Remove it, or use another --out."
    )
    assert (place / "net-pruned" / "net.py").read_text() == LEARNS


def test_a_search_that_misses_its_target_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = "0.600 of the macs are left, not 0.5: no group can give more"

    def misses(trials: Trials, *_: object) -> Found:
        start = trials.space.start
        with trials.begin("misses") as run:
            (chosen,) = run.evaluate([dict.fromkeys(trials.space.groups, 0.25)], start)
            return run.found(chosen, run.trained(chosen, start, None), note)

    monkeypatch.setattr("graphprune.search.finder.SEARCHES", {"netadapt": misses})
    result = run("compress", "net.py", "--no-bench", "--round-to", 1, "--search", "netadapt")
    assert result.exit_code == 0, result.output
    assert json.loads((place / "net-pruned" / "report.json").read_text())["note"] == note
    assert f"Note: {note}." in " ".join(result.stdout.split())


@pytest.mark.parametrize("search", ["annealing", "amc"])
def test_what_a_search_finds_is_trained(monkeypatch: pytest.MonkeyPatch, search: str) -> None:
    quick = {"annealing": lambda t, s, tune, _: annealing(t, s, schedule=Schedule(start=20, tries=1), finetune=tune)}
    quick["amc"] = lambda t, s, tune, _: amc(t, 1 - s, episodes=Episodes(4, 1), finetune=tune)
    monkeypatch.setattr("graphprune.search.finder.SEARCHES", quick)
    plain, trained = report("--search", search), report("--search", search, "--epochs", 3, "--out", "trained")
    assert stems(plain) == stems(trained) and plain["accuracy"]["shrunk"] < trained["accuracy"]["shrunk"]


def test_the_seed_is_that_of_training_too(place: Path) -> None:
    """The model is the same for all seeds; the order of the batches, and so what training and scores come to, is not."""
    drawn = LEARNS.replace("return Net()", "torch.manual_seed(0); return Net()").replace(
        "for i in range(0, 32, 8)]", "for i in range(0, 32, 8)]; batches = Drawn(batches)"
    )
    order = "    def __iter__(self):\n        return iter([self[i] for i in torch.randperm(len(self))])\n"
    (place / "net.py").write_text(f"{drawn}\nclass Drawn(list):\n{order}")
    for words in (("--epochs", 1), ("--criterion", "taylor", "--batches", 2)):
        one, same, other = (report(*words, "--force", "--seed", seed)["files"] for seed in (1, 1, 2))
        assert one["weights.safetensors"] == same["weights.safetensors"] != other["weights.safetensors"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("Y[i : i + 8])", "Y[i : i + 8] + 7)"), "(IndexError: Target "),
        (("(X[i : i + 8], Y", "(X[i : i + 7], Y"), "(ValueError: Expected input batch_size"),
        (("optim.Adam(p, lr=1e-2)", "optim.Adam(p, rate=1e-2)"), "(TypeError: "),
        (("return Training.on(batches,", "return Training(wrong,"), "(KeyError: 'no luck')"),
    ],
)
@pytest.mark.parametrize("words", [("--epochs", 1), ("--criterion", "taylor")])
def test_mistakes_in_training_end_in_one_line(place: Path, change: tuple[str, str], told: str, words: tuple) -> None:
    text = LEARNS.replace(*change).replace("Training(wrong, nn.functional.cross_entropy", "Training(wrong")
    (place / "net.py").write_text(
        text + "\ndef wrong(model, optimizer, criterion, epoch):\n    raise KeyError('no luck')\n"
    )
    result = run("compress", "net.py", "--no-bench", "--round-to", 1, *words)
    line = complaint(result)
    assert result.exit_code == 2 and line.startswith("net.py: raises while it trains as training() says"), line
    assert told in line and line.endswith("Fix it there.")


@pytest.mark.parametrize("search", ["sensitivity", "annealing", "netadapt", "autocompress"])
def test_searches_meet_their_target(search: str) -> None:
    made = report("--search", search, "--sparsity", 0.3, "--epochs", int(search in ("netadapt", "autocompress")))
    assert made["proof"]["difference"] < 1e-9
    if search == "netadapt":
        assert made["macs"]["shrunk"] <= 0.7 * made["macs"]["dense"]
    else:  # of the weights of both convolutions, which make all channels of the one group
        assert 32 - stems(made) == 10


def test_the_table_of_sensitivity(place: Path) -> None:
    words = ("sensitivity", "net.py", "--share", 0.25, "--share", 0.5)
    made = json.loads(run(*words, "--json").stdout)
    assert made["scores"].keys() == {"stem.weight"} and made["scores"]["stem.weight"].keys() == {"0.25", "0.5"}
    result = run(*words, "--csv", "table.csv", "--plot", "plot.svg")
    assert result.exit_code == 0 and "stem.weight" in result.stdout
    rows = list(csv.reader((place / "table.csv").open()))
    assert rows[0] == ["layername", "0.25", "0.5"] and [row[0] for row in rows[1:]] == ["stem", "body"]
    assert float(rows[1][1]) == made["scores"]["stem.weight"]["0.25"]
    assert ET.parse(place / "plot.svg").getroot().tag.endswith("svg")


def test_a_table_that_cannot_be_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *rest: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        result = run("sensitivity", "net.py", "--share", 0.5, "--csv", "table.csv")
    assert result.exit_code == 2 and "stem.weight" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("table.csv: cannot be written (No space left on device).")
    monkeypatch.setattr("graphprune.cli.look.load_source", None)  # nothing is loaded, much less evaluated
    for option, name, told in (
        ("--csv", "no/x.csv", f"no/x.csv: there is no folder {place / 'no'} to make it in. Name another file."),
        ("--plot", "no/x.svg", f"no/x.svg: there is no folder {place / 'no'} to make it in. Name another file."),
        ("--csv", ".", ".: is a folder. Name another file."),
        ("--csv", "net.py", "net.py: is named for something else as well. Name another file."),
        ("--plot", "x.txt", "x.txt: no plot has the suffix '.txt'. Use .svg, .png or .pdf."),
    ):
        assert complaint(run("sensitivity", "net.py", option, name)) == told
    (place / "link.csv").symlink_to(place / "net.py")
    for words in (
        ("net.py:build_model", "--csv", "net.py"),
        ("net.py", "--csv", f"{place}/../{place.name}/net.py"),
        ("net.py", "--csv", "link.csv"),
    ):
        assert (
            complaint(run("inspect", *words)) == f"{words[2]}: is named for something else as well. Name another file."
        )
    assert (place / "net.py").read_text() == LEARNS
    told = "x.svg: is named for something else as well. Name another file."
    assert complaint(run("sensitivity", "net.py", "--csv", "x.svg", "--plot", "x.svg")) == told
    assert complaint(run("inspect", "net.py", "--csv", "x.svg", "--csv-groups", "x.svg")) == told
    assert (place / "net.py").read_text() == LEARNS


def test_dependencies_in_the_columns_of_others(place: Path) -> None:
    grouped = LEARNS.replace(
        "self.body = nn.Conv2d(width, width, 3, padding=1)",
        "self.body = nn.Conv2d(width, width, 3, padding=1, groups=4)",
    )
    (place / "grouped.py").write_text(grouped)
    assert run("inspect", "grouped.py", "--csv", "sets.csv", "--csv-groups", "groups.csv").exit_code == 0
    assert (place / "sets.csv").read_text() == "Dependency Set,Layers\nSet 1,stem,body\n"
    assert (place / "groups.csv").read_text() == "Conv Layer Name,Group\nstem,4\nbody,4\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compress", "net.py", "--search", "anealing"), "search 'anealing': is not known (did you mean 'annealing'?). Use "),
        (("compress", "net.py", "--schedule", "cubic"), "schedule 'cubic': is not known. Use one of one_shot, linear, agp"),
        (("compress", "net.py", "--schedule", "agp", "--search", "amc"), "--search and --schedule: exclude each other"),
        (("compress", "plain.py", "--epochs", "1"), "plain.py: has no training(), which --epochs needs. Add one."),
        (("compress", "plain.py", "--search", "amc"), "plain.py: has no evaluate(model), which --search needs. Add one."),
        (("compress", "plain.py", "--criterion", "taylor"), "criterion 'taylor': looks at gradients. Give calibrate(model)"),
        (("compress", "net.py", "--epochs", "1", "--checkpoint", "."), "--epochs: is not for checkpoints"),
        (("compress", "net.py", "--rounds", "3"), "--rounds: has no effect without --schedule, --search or --epochs."),
        (("compress", "net.py", "--journal", "j"), "--journal: has no effect without --schedule, --search or --epochs."),
        (("compress", "net.py", "--workers", "ray"), "--workers: has no effect without --schedule, --search or --epochs."),
        (("compress", "net.py", "--workers", "4"), "workers '4': is no address. Use 'ray', or one such as"),
        (("compress", "net.py", "--search", "annealing", "--rounds", "3"), "--search and --rounds: exclude each other."),
        (("compress", "net.py", "--search", "annealing", "--scope", "global"), "--scope global: is not for --search"),
        (("compress", "net.py", "--schedule", "agp", "--checkpoint", "."), "--schedule: is not for checkpoints"),
        (("sensitivity", "plain.py"), "plain.py: has no evaluate(model). Add one."),
        (("sensitivity", "net.py", "--share", "1.5"), "shares: 1.5 is not in (0, 1). Use shares such as 0.1."),
        (("sensitivity", "net.py", "--share", "0.5", "--plot", "x.txt"), "x.txt: no plot has the suffix '.txt'. Use .svg"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(place: Path, words: tuple[str, ...], message: str) -> None:
    result = run(*words, *(("--no-bench",) if words[0] == "compress" else ()))
    line = result.stderr.strip().splitlines()[-1]
    assert result.exit_code == 2 and line.startswith(message)
    assert {path.name for path in place.iterdir()} == {"net.py", "plain.py"}


def test_the_commands_are_all_there() -> None:
    assert {command.name for command in app.registered_commands} == {
        "compress",
        "inspect",
        "sensitivity",
        "verify",
        "bench",
    }
