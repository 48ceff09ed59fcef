"""assignment.py: answers in the order of the assignment's points, and the best that they state."""

import pytest

import assignment


def answer(point, text="So it is. More.", question="Q3. Is it so?", verdict="supported"):
    return {"question": question, "answer": text, "verdict": verdict, "point": point, "figure": ""}


def test_each_point_has_its_answers_or_says_that_there_is_none():
    answers = {"01_a": [answer(""), answer("4b"), answer("R1", "Yes.", "No number?", None)],
               "02_b": [answer("4b", "Later.")]}
    rows = assignment.table_by_point(answers, {"01_a": ["4b", "R1"], "02_b": ["4b", "4c"], "03_c": ["4c"]})
    assert list(dict.fromkeys(row["point"] for row in rows)) == list(assignment.POINTS)
    by_point = {point: [row for row in rows if row["point"] == point] for point in assignment.POINTS}
    assert [(row["notebook"], row["place"], row["answer"]) for row in by_point["4b"]] == [
        ("01_a", 2, "So it is."), ("02_b", 1, "Later.")]
    assert (by_point["R1"][0]["number"], by_point["R1"][0]["question"]) == ("", "No number?")
    assert (by_point["4b"][0]["number"], by_point["4b"][0]["question"]) == ("Q3", "Is it so?")
    assert [(row["notebook"], row["answer"]) for row in by_point["4c"]] == [("02_b", ""), ("03_c", "")]
    assert [(row["notebook"], row["answer"]) for row in by_point["1"]] == [("", "")]


def test_points_are_found_in_a_file_as_in_a_cell():
    assert assignment.points_named('give("a", point="3a")\nother_point="x"; give(point="R1")') == ["3a", "R1"]
    assert assignment.points_named(r'"give(\"a\", point=\"3a\")\n"') == ["3a"]
    assert assignment.points_named('study.answer("R1", "Q1?")\nstudy.answer("", "Q")') == ["R1"]
    assert assignment.points_named(r'"study.answer(\"R1\", \"Q1?\")\n"') == ["R1"]


@pytest.mark.parametrize("text, first", [
    ("One. Two.", "One."), ("0.5 % (1 seed) at 5e-4. lr 1: lost. Then", "0.5 % (1 seed) at 5e-4. lr 1: lost."),
    ("No end", "No end"), ("", "")])
def test_first_sentences(text, first):
    assert assignment.first_sentence(text) == first


def test_an_answer_in_one_line_keeps_the_ends_of_its_interval():
    whole = "A against B: +1.0 points (unadjusted 95 % interval -2.0 to +4.0; 3 seeds, 1,300 reviews): undecided. More."
    assert assignment.one_line(whole) == "A against B: +1.0 points (-2.0 to +4.0): undecided."
    assert assignment.one_line("It is 75.7 % (3 seeds, 95 % interval 69.7 to 81.7).") == (
        "It is 75.7 % (3 seeds, 95 % interval 69.7 to 81.7).")


@pytest.mark.parametrize("best", ["91.2 % (3 seeds, 300 reviews; 95 % interval 90.0 to 92.4)",
                                  "91.2 % (90.0 to 92.4; 1 seed)", "91.2 ± 0.4 % (3 seeds)"])
def test_the_best_accuracy_is_found_as_it_is_stated(best):
    answers = {"01_a": [answer("1", "99.9 % of all"), answer("4", "A 90.0 % (1 seed); Bayes 97.0%.")],
               "02_b": [answer("4", f"It is 80.1 % (1 seed), then {best}; p = 0.1 (3 seeds)")]}
    assert assignment.best_accuracy(answers) == (best, "02_b", 1)
    assert assignment.best_accuracy({"01_a": [answer("4", "not measured, loss 3 (1 seed)")]}) is None
