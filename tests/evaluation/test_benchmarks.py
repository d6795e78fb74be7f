"""The benchmarks' own scoring code of lmms-eval, offline, on data of the same schema: scores computed by hand."""

import pytest

pytest.importorskip("lmms_eval", reason="the extra eval is not installed")

from demo_benchmarks import write_benchmarks
from lmms_eval.api.model import lmms

from hf_lop.errors import InvalidInputError
from hf_lop.evaluation.harnesses import run_task, task_manager
from hf_lop.evaluation.paper import TASKS, PaperScores, paper_table

PICTURES = 8


class Oracle(lmms):
    """Knows every answer; every third question (2, 5, 8, ...) it may answer wrongly."""

    is_simple = False

    def __init__(self, errs, ending=""):
        super().__init__()
        self.errs, self.ending = errs, ending

    def generate_until(self, requests):
        return [self.answer(*request.args[3:]) + self.ending for request in requests]

    def answer(self, doc_id, task, split):
        row = self.task_dict[task][split][doc_id]
        if not self.errs or doc_id % 3 != 2:
            return row["answer"]
        flipped = {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes"} | dict(zip("ABCD", "BCDA", strict=True))
        return flipped.get(row["answer"], "nothing")

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_benchmarks(tmp_path_factory.mktemp("benchmarks"), PICTURES)
    names = [*TASKS, "lop_demo"]
    manager = task_manager("lmms-eval", names, [str(folder)])

    def run(task, model):
        (result,) = run_task("lmms-eval", model, task, manager)
        assert len(result.answers) == result.samples == result.total
        return result.metrics

    return run


def test_only_local_tasks_are_indexed(run, tmp_path):
    write_benchmarks(tmp_path, 1)
    index = task_manager("lmms-eval", ["pope"], [str(tmp_path)]).task_index
    assert {name for name, entry in index.items() if entry["type"] == "task"} == {*TASKS, "lop_demo"}


@pytest.mark.slow
def test_all_right(run):
    knows = Oracle(errs=False)
    assert run("mme", knows) == {"mme_perception_score": 400, "mme_cognition_score": 400}  # 2 + 2 categories, 200 each
    assert run("mmbench_en_dev_static", knows)["gpt_eval_score"] == 100
    assert run("mmmu_val", knows)["mmmu_acc"] == 1
    assert run("pope", knows)["pope_accuracy"] == run("pope", knows)["pope_f1_score"] == 1
    assert run("lop_demo", knows) == {"accuracy": 1, "perception": 1, "cognition": 1}


@pytest.mark.slow
def test_every_third_wrong(run):
    errs = Oracle(errs=True)
    # Pairs with one of two right (1, 2, 4, 5, 7) are worth 50, else 200. Perception: pairs 0 and 4 give 125, 2 and 6 give
    # 125; cognition: 1 and 5 give 50, 3 and 7 give 125.
    assert run("mme", errs) == {"mme_perception_score": 250, "mme_cognition_score": 175}
    # 16 questions in two orders of options, right only if both are: 1, 2, 4, 5, 7, 8, 10, 11, 13, 14 are not.
    assert run("mmbench_en_dev_static", errs) == {"gpt_eval_score": 100 * 6 / 16}
    assert run("mmmu_val", errs) == {"mmmu_acc": 11 / 16}
    pope = run("pope", errs)  # of 8 yes 3 are missed, of 8 no 2 are called yes
    expected = {"pope_accuracy": 11 / 16, "pope_precision": 5 / 7, "pope_recall": 5 / 8, "pope_f1_score": 10 / 15}
    assert pope == pytest.approx({**expected, "pope_yes_ratio": 0.5})
    assert run("lop_demo", errs)["accuracy"] == 22 / 32


@pytest.mark.slow
def test_a_full_stop_counts_in_pope_alone(run):
    talks = Oracle(errs=False, ending=".")
    assert run("pope", talks)["pope_accuracy"] == 0
    assert run("mme", talks)["mme_perception_score"] == 400


@pytest.mark.slow
def test_control_characters_would_lose_a_run(run):
    """Why our model strips them: MMBench writes all answers into a table that cannot hold them."""
    from hf_lop.errors import EvaluationError

    with pytest.raises(EvaluationError, match=r"mmbench_en_dev_static failed in lmms-eval. IllegalCharacterError"):
        run("mmbench_en_dev_static", Oracle(errs=False, ending="\x07"))


# Table 1 of the paper: MME-P, MME-R, MMBench, MMMU, POPE, then its Avg and drop.
ROWS = {
    "dense": ((1694.39, 640.36, 86.88, 51.29, 87.48), 75.22, 0.0),
    "magnitude 20": ((1397.55, 327.86, 78.05, 38.55, 83.76), 66.79, 0.112),
    "wanda 20": ((1643.19, 554.64, 84.52, 43.69, 88.22), 72.14, 0.041),
    "flap 30": ((1537.39, 534.64, 82.12, 41.24, 87.46), 70.27, 0.066),
    "lop 20": ((1631.15, 605.00, 86.02, 46.03, 88.07), 73.37, 0.025),
    "lop 30": ((1613.73, 575.00, 85.65, 44.16, 87.83), 72.55, 0.035),
    "lop 50": ((1478.07, 468.57, 82.17, 35.51, 87.47), 68.38, 0.091),
}


class TestTable:
    def test_published_averages_and_drops(self):
        dense = PaperScores(*ROWS["dense"][0])
        for scores, average, drop in ROWS.values():
            found = PaperScores(*scores)
            assert found.average == pytest.approx(average, abs=0.0101)
            assert found.drop(dense)["average"] == pytest.approx(drop, abs=6e-4)

    def test_print(self):
        rows = {name: PaperScores(*ROWS[name][0]) for name in ("dense", "lop 50")}
        assert paper_table(rows, rows["dense"]).splitlines() == [
            "| model | MME-P | MME-R | MMBench | MMMU | POPE | Avg |",
            "|---|---:|---:|---:|---:|---:|---:|",
            "| dense | 1694.39 | 640.36 | 86.88 | 51.29 | 87.48 | 75.22 |",
            "| lop 50 | 1478.07 (12.8%) | 468.57 (26.8%) | 82.17 (5.4%) | 35.51 (30.8%) | 87.47 (0.0%) | 68.38 (9.1%) |",
        ]
        with pytest.raises(InvalidInputError, match="no model"):
            paper_table({})

    def test_nothing_is_divided_by_zero(self):
        none = PaperScores(0, 0, 50, 50, 0)
        assert set(none.drop(none)) == {"mmbench", "mmmu", "average"}
