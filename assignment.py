"""The assignment's points, and a run's answers put in their order: for the front page and README.

A notebook's answer names its point: `study.answer("4a", "Q2. ...", "...")`. Nothing is
imported beyond the standard library: report.py has no torch to load.
"""
import re

POINTS = {
    "1": "environment", "2": "bert-base-uncased", "2a": "lower-casing",
    "3": "vectorize_ex", "3a": "special tokens", "3b": "limit of positions", "3c": "padding",
    "3d": "input mask",
    "4": "training loop and curves", "4a": "Adam, learning rate", "4b": "warm-up, decay, epochs",
    "4c": "memory, batch size, accumulation",
    "R1": "first or last k words", "R2": "masked-LM pretraining", "R3": "Adam or AdamW",
    "R4": "gradient clipping", "R5": "weight decay, dropout, attention dropout"}
VERDICTS = "supported", "contradicted", "undecided", ""  # of what was expected; "": nothing was
# As pages state it: "75.4 % (3 seeds, 300 reviews; 95 % interval 70.0 to 80.8)".
ACCURACY = re.compile(r"(\d+\.\d)(?: ± \d+\.\d)? % \((?:\d+\.\d to \d+\.\d; )?\d+ seeds?\b[^)]*\)")


def sentences(text):
    """Return a text's sentences; a new one begins with a capital."""
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)


def first_sentence(text):
    """Return a text's first sentence."""
    return sentences(text)[0]


def one_line(answer):
    """Return an answer's first sentence, of an interval its two ends alone."""
    return re.sub(r"\((?:unadjusted )?95 % interval ([^;)]+)(?:; \d+ seeds?, [\d,]+ reviews?)?\)",
                  r"(\1)", first_sentence(answer))


def spread(values, text="{:,}".format):
    """Return the range of some numbers as text: "200 to 300"."""
    return " to ".join(dict.fromkeys(text(end) for end in (min(values), max(values))))


def points_named(source):
    """Return the points that a notebook's file names, whether it was run or not."""
    return re.findall(r'\b(?:point=|study\.answer\()\\?"(\w+)\\?"', source)


def split_question(question):
    """Return (its number, the rest): "Q2. Why?" gives ("Q2", "Why?")."""
    number, rest = re.match(r"(?s)(?:(Q\d+)\. )?(.*)", question).groups()
    return number or "", rest


def table_by_point(answers, named):
    """Return the rows of the table by point: one for each answer, at least one for each point.

    answers: {notebook: its answers, in order}; named: {notebook: points that its source names}.
    `place`: 1 for the notebook's first answer; a point that has none yet: `answer` is "".
    """
    rows = []
    for point, title in POINTS.items():
        before = len(rows)
        for notebook, points in named.items():
            found = [(place, row) for place, row in enumerate(answers.get(notebook, ()), 1)
                     if row.get("point") == point]
            for place, row in found or [(0, {})] * (point in points):
                number, question = split_question(row.get("question", ""))
                rows.append({"point": point, "title": title, "notebook": notebook, "place": place,
                             "number": number, "question": question,
                             "verdict": row.get("verdict", ""),
                             "answer": first_sentence(row.get("answer", ""))})
        if len(rows) == before:
            rows.append({"point": point, "title": title, "notebook": "", "place": 0, "number": "",
                         "question": "", "verdict": "", "answer": ""})
    return rows


def best_accuracy(answers):
    """Return (as it is stated, notebook, place) of the best accuracy over seeds; None: none."""
    stated = [(float(match.group(1)), match.group(), notebook, place)
              for notebook, rows in answers.items() for place, row in enumerate(rows, 1)
              for match in ACCURACY.finditer(row["answer"])]
    return max(stated, key=lambda one: one[0])[1:] if stated else None
