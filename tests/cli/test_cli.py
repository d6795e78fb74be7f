import json
import re
from inspect import signature

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_lop import LOPPruner, __version__, demo
from hf_lop.cli import app, main
from hf_lop.cli.prune import prune
from hf_lop.pruner.methods import METHODS
from hf_lop.recovery.choose import RECOVERIES
from tests.fake_pruner import fake_pruner


@pytest.fixture(scope="module")
def folders(tmp_path_factory, built, pruner):
    root = tmp_path_factory.mktemp("cli")
    built["gated"].save_pretrained(root / "dense")
    pruner.save_pretrained(root / "pruner")
    return root


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(monkeypatch, capsys, *arguments):
    """Run through `main`, as the console script does: one line on stderr, exit code 1."""
    monkeypatch.setattr("sys.argv", ["hf-lop", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    assert stop.value.code == 1
    assert captured.out == ""
    return captured.err


def test_version_and_help():
    assert run("--version").strip() == __version__
    for command in (
        "quickstart",
        "inspect",
        "plan",
        "prune",
        "export",
        "fit",
        "compare",
        "evaluate",
        "train-predictor",
    ):
        assert command in run("--help")
        assert "--json" in run(command, "--help")


def test_inspect(folders):
    facts = json.loads(run("inspect", folders / "dense", "--json"))
    assert facts["can_be_pruned"] is True
    assert facts["widths"] == [48] * 4
    assert facts["parameters"]["ffn"] == 4 * 3 * 32 * 48
    assert facts["parameters"]["total"] == AutoModelForCausalLM.from_pretrained(folders / "dense").num_parameters()
    assert "can be pruned: yes" in run("inspect", folders / "dense")


def test_help_names_the_methods_there_are():
    (option,) = [option for option in signature(prune).parameters.values() if option.name == "method"]
    named = re.findall(r"[a-z]+", re.sub(r"\(.*?\)", "", option.annotation.__metadata__[0].help))
    assert sorted(named) == sorted(METHODS)


def test_plan(folders, pruner, tmp_path):
    data = json.loads(run("plan", folders / "pruner", "--ratio", 0.3, "--json", "--plot", tmp_path / "plan.png"))
    assert data["widths"] == list(pruner.plan(0.3).widths)
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert "layer" in run("plan", folders / "pruner", "--memory", "100KB")


def test_prune_then_inspect_and_load(folders, tmp_path, pruner):
    out = tmp_path / "out"
    report = json.loads(
        run("prune", folders / "dense", "--pruner", folders / "pruner", "--ratio", 0.3, "--out", out, "--json")
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.num_parameters() == report["parameters"] == pruner.plan(0.3).parameters
    assert model.config.intermediate_size == list(pruner.plan(0.3).widths)
    facts = json.loads(run("inspect", out, "--json"))
    assert facts["can_be_pruned"] is True
    assert facts["pruned"]["widths"] == list(pruner.plan(0.3).widths)
    assert facts["pruned"]["criterion"] == "l2"


@pytest.mark.slow
def test_fit_prune_and_resume(tmp_path):
    data = tmp_path / "prose.jsonl"
    words = ("red", "green", "circle", "square", "north", "center")
    rows = [{"text": " ".join(words[(i * k) % 6] for k in range(1, 6))} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--data",
        data,
        "--samples",
        6,
        "--search-samples",
        4,
        "--predictor",
        "mlp",
        "--out",
        tmp_path / "pruner",
    ]
    report = json.loads(run("fit", demo.MODEL_DIR, *options, "--json"))
    pruner = LOPPruner.from_pretrained(tmp_path / "pruner")
    assert pruner.config.calibration["dataset"] == "prose.jsonl"
    assert pruner.config.predictor_loss == report["loss"]
    assert sum(pruner.plan(0.5).widths) == 256
    options[-1] = tmp_path / "again" / "pruner"
    (tmp_path / "pruner.journal").rename(tmp_path / "kept")
    (tmp_path / "again").mkdir()
    (tmp_path / "kept").rename(tmp_path / "again" / "pruner.journal")
    run("fit", demo.MODEL_DIR, *options, "--resume")
    assert LOPPruner.from_pretrained(tmp_path / "again" / "pruner").config.search_table == pruner.config.search_table


@pytest.mark.slow
def test_compare(tmp_path):
    data = tmp_path / "questions.parquet"
    demo.load_data("search", 40).to_parquet(data)
    options = [
        "--samples",
        8,
        "--search-samples",
        4,
        "--report-samples",
        8,
        "--seeds",
        2,
        "--reward",
        "log_likelihood",
    ]
    options += ["--ratio", 0.5, "--method", "lop", "--method", "cmaes", "--recover", "--out", tmp_path / "out"]
    options += ["--search", "cmaes", "--evaluations", 3]
    result = json.loads(run("compare", demo.MODEL_DIR, "--data", data, *options, "--json"))
    assert {row["method"] for row in result["rows"]} == {"dense", "lop", "cmaes"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"comparison.md", "comparison.json", "searches.png", "fit-0-cmaes", "fit-1-cmaes"} <= files
    again = json.loads(run("compare", demo.MODEL_DIR, "--data", data, *options, "--json"))  # from the journals
    assert again == result


def test_methods(folders, tmp_path):
    for method in ("uniform", "flap"):
        run("prune", folders / "dense", "--pruner", folders / "pruner", "--ratio", 0.5, "--method", method,
            "--recover", "fold", "--out", tmp_path / method)  # fmt: skip
        facts = json.loads(run("inspect", tmp_path / method, "--json"))["pruned"]
        assert (facts["method"], facts["recovery"], sum(facts["widths"])) == (method, "fold", 96)


def test_train_predictor(built, tmp_path):
    out = tmp_path / "mlp"
    fake_pruner(built["gated"], predictor="transformer").save_pretrained(tmp_path / "pruner")
    report = json.loads(run("train-predictor", tmp_path / "pruner", "--predictor", "mlp", "--out", out, "--json"))
    assert report["predictor"] == "mlp"
    assert json.loads(run("plan", out, "--ratio", 0.5, "--json"))["neurons_removed"] == 96


class TestMistakes:
    def test_a_method_without_its_search(self, folders, monkeypatch, capsys, tmp_path):
        arguments = ("--data", tmp_path / "none.txt", "--out", tmp_path / "out", "--method", "mcts")
        assert "Add --search mcts" in fails(monkeypatch, capsys, "compare", folders / "dense", *arguments)

    def test_bad_ratio(self, folders, monkeypatch, capsys):
        assert "ratio is 1.2; it must be in [0, 1)" in fails(
            monkeypatch, capsys, "plan", folders / "pruner", "--ratio", 1.2
        )

    def test_no_budget(self, folders, monkeypatch, capsys):
        assert "give at least one of ratio" in fails(monkeypatch, capsys, "plan", folders / "pruner")

    def test_not_a_pruner(self, folders, monkeypatch, capsys):
        assert "not a pruner" in fails(monkeypatch, capsys, "plan", folders / "dense", "--ratio", 0.3)

    def test_unknown_repository(self, monkeypatch, capsys):
        assert "org/no-such-model" in fails(monkeypatch, capsys, "inspect", "org/no-such-model")

    def test_fit_of_too_little_data(self, folders, tmp_path, monkeypatch, capsys):
        (tmp_path / "data.txt").write_text("one\ntwo\n")
        message = fails(
            monkeypatch, capsys, "fit", folders / "dense", "--data", tmp_path / "data.txt", "--out", tmp_path / "out"
        )
        assert "2 rows cannot be split into parts of [400, 400]" in message

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            (("--ratio", 1.5), "ratios has 1.5"),
            (("--method", "x"), "methods has 'x'"),
            (("--seeds", 0), "pruners is empty"),
        ],
    )
    def test_compare_checks_before_it_fits(self, folders, tmp_path, monkeypatch, capsys, option, words):
        command = ("compare", folders / "dense", "--data", "missing.txt", "--out", tmp_path / "out", *option)
        assert words in fails(monkeypatch, capsys, *command)

    def test_fit_without_resume_keeps_the_journal(self, folders, tmp_path, monkeypatch, capsys):
        (tmp_path / "out.journal").mkdir()
        (tmp_path / "out.journal" / "probes.json").write_text("{}")
        message = fails(monkeypatch, capsys, "fit", folders / "dense", "--data", "x.txt", "--out", tmp_path / "out")
        assert "not empty" in message

    def test_full_folder(self, folders, tmp_path, monkeypatch, capsys):
        (tmp_path / "mine.txt").write_text("keep me")
        message = fails(
            monkeypatch,
            capsys,
            "prune",
            folders / "dense",
            "--pruner",
            folders / "pruner",
            "--ratio",
            0.3,
            "--out",
            tmp_path,
        )
        assert "not empty" in message
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("command", ["prune", "make-elastic"])
    def test_a_folder_below_a_file(self, folders, tmp_path, monkeypatch, capsys, command):
        (tmp_path / "file").write_text("")
        arguments = [folders / "dense", "--pruner", folders / "pruner", "--out", tmp_path / "file" / "a" / "b"]
        arguments += ["--ratio", 0.3] if command == "prune" else []
        monkeypatch.setattr("hf_lop.pruner.pruner.LOPPruner.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
        assert f"{tmp_path / 'file'} is no folder that you may write" in fails(
            monkeypatch, capsys, command, *arguments
        )

    def test_bad_predictor_writes_nothing(self, folders, tmp_path, monkeypatch, capsys):
        out = tmp_path / "out"
        assert "no predictor 'gru'" in fails(
            monkeypatch, capsys, "train-predictor", folders / "pruner", "--predictor", "gru", "--out", out
        )
        assert not out.exists()


def test_prune_recovers_by_default_and_says_so(tmp_path):
    expected = {"auto": "sketch", "none": None, "fold": "fold"}
    for recover, recovery in expected.items():
        command = ["prune", demo.MODEL_DIR, "--pruner", demo.PRUNER_DIR, "--ratio", 0.5, "--out", tmp_path / recover]
        command += ["--recover", recover] if recover != "auto" else []
        result = CliRunner().invoke(app, [*map(str, command), "--json"], catch_exceptions=False)
        assert json.loads(result.stdout)["pruning_config"]["recovery"] == recovery
        assert f"Recovery: {RECOVERIES[recovery] if recovery else 'none'}." in result.stderr


def test_a_recovery_that_cannot_be_done_is_refused(monkeypatch, capsys, folders, tmp_path):
    command = ["prune", folders / "dense", "--pruner", folders / "pruner", "--ratio", 0.5, "--out", tmp_path / "out"]
    for recover, words in (
        ("lstsq", "needs data"),
        ("bias", "moved to the comparison"),
        ("sketch", "no sketch"),
        ("lora", "choose"),
    ):
        assert words in fails(monkeypatch, capsys, *command, "--recover", recover)
    assert not (tmp_path / "out").exists()


def test_an_error_is_json_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-lop", "inspect", str(tmp_path), "--json"])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["kind"] == "InvalidInputError"
    assert captured.err == f"Error: {found['error']}\n"


def test_help_shows_brackets():
    assert '"ratios": [one per' in " ".join(CliRunner().invoke(app, ["train-predictor", "--help"]).stdout.split())
