"""The pages of a report, one for each notebook; their look is in report.html.j2."""
import json
import platform
import re
from collections import namedtuple
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from nbconvert import preprocessors
from nbconvert.filters import Highlight2HTML, ansi2html, markdown2html, strip_ansi

import files
from assignment import first_sentence, one_line, points_named

ROOT = Path(__file__).resolve().parent
# Of a progress bar only the last state: a function in nbconvert 5.6, a class in 7.
coalesce = (getattr(preprocessors, "coalesce_streams", None)
            or preprocessors.CoalesceStreamsPreprocessor().preprocess)
# Characters that act on a page, or a terminal, instead of being seen: control characters (but for
# tab and line ends) and those that reorder the text around them, as Unicode's Annex 9 has them.
UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
                    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def spell(text):
    """Spell out what acts instead of being seen: an escape character becomes \\x1b."""
    return UNSEEN.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def show_error(output):
    """Return a failed cell's traceback as HTML: IPython's colours, but the message as text."""
    text = "\n".join(output.traceback)
    return ansi2html(text.replace(output.evalue, spell(output.evalue)) if output.evalue else text)


def find_cell(path):
    """Say which cell of a notebook papermill is in; "" while it writes the file."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        return ""
    begun = [c["metadata"]["papermill"]["start_time"] for c in cells
             if c["cell_type"] == "code" and c["source"] and "papermill" in c["metadata"]]
    return f"cell {len(begun) - begun.count(None)} of {len(begun)}"


def judge(source, target, log, why, timeout, code, seconds):
    """Judge a notebook that ended; return its status row, the notebook, and the end of its log."""
    lines = strip_ansi(log.read_text(encoding="utf-8", errors="replace")).strip().split("\n")
    try:
        nb = nbformat.read(str(target), as_version=4)
    except Exception:  # noqa: BLE001 - papermill wrote nothing, or died while writing
        nb = nbformat.read(str(source), as_version=4)
    errors = [o for c in nb.cells for o in c.get("outputs", []) if o.output_type == "error"]
    reason = f"longer than {timeout:g} min" if why == "timeout" else "stopped"
    if code and not why:
        why, reason = "failed", (f"{errors[0].ename}: {errors[0].evalue}" if errors else
                                 f"papermill died, signal {-code}" if code < 0 else lines[-1])
    reason = re.split("[\r\n]", spell(reason))[0][:200] + f" (in {find_cell(target) or 'no cell'})"
    row = {"status": why or "ok", "reason": why and reason, "seconds": round(seconds, 1)}
    return row, nb, "\n".join(lines[-12:]) if why and not errors else ""


def markdown(text):
    """Convert Markdown: headings without ids and anchors, notebooks' links leading to pages."""
    text = re.sub(r'<a class="anchor-link".*?</a>|(?<=<h\d) id="[^"]*"', "", markdown2html(text))
    return dress(re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", text))


NUMBER = re.compile(r"\s*(?:[-+−]?[\d.,]+(?:e[-+]?\d+)?(?: ?%)?|NaN|[-–]?)\s*")
CELL = re.compile(r"<(t[hd])\b([^>]*)>(.*?)</\1>", re.DOTALL)


def align(match):
    """Return a table whose columns of numbers, headings too, have the class `number`."""
    head, end, body = match.group().partition("</thead>")
    rows = [[NUMBER.fullmatch(cell[2]) for cell in CELL.findall(row)]
            for row in body.split("<tr")[1:]]
    # From the last column on: a row's first cells may belong to several rows.
    columns = [all(column) for column in zip(*(row[::-1] for row in rows))][::-1]

    def mark(row):
        others = len(CELL.findall(row)) - len(columns)
        kinds = iter([False] * others + columns) if others >= 0 else iter(())
        return CELL.sub(lambda cell: "<{0}{1}{2}>{3}</{0}>".format(
            cell.group(1), cell.group(2), ' class="number"' * next(kinds, False), cell.group(3)),
            row)

    text = "<tr".join(mark(row) for row in (head + end + body).split("<tr"))
    text = re.sub(r"<th\b([^>]*)></th>", r"<td\1></td>", text)  # a corner is no heading
    return f'<div class="scroll" role="group" aria-label="table" tabindex="0">{text}</div>'


def dress(text):
    """Return HTML whose tables and sources are reached, and scrolled, by keyboard."""
    text = re.sub(r"<table\b.*?</table>", align, text, flags=re.DOTALL)
    return re.sub(r"<pre\b", '<pre tabindex="0"', text)


ANSWER = "question", "answer", "figure", "verdict", "point"  # as studies.Study keeps one
# What is known of a notebook before it is run: texts, and the assignment's points it names.
Headline = namedtuple("Headline", "title lead points")


def read_headline(path):
    """Read a notebook's title, the first sentence of its first paragraph, and its points."""
    cells = nbformat.read(str(path), as_version=4).cells
    text = markdown("\n\n".join(c.source for c in cells if c.cell_type == "markdown"))
    found = (re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("h1", "p"))
    title, lead = (Markup(match.group(1)).striptags() if match else "" for match in found)
    points = points_named("\n".join(c.source for c in cells if c.cell_type == "code"))
    return Headline(title or path.stem, first_sentence(lead), points)


def take_notes(nb):
    """Return what a notebook's outputs say for the index; mark its answers' places on the page.

    answers: as they stand there; trials: {trial: seconds}; predictions: {trial: counts}, both of
    studies.note_of_trials; run: of studies.Study.run_note.
    """
    notes = {"answers": [], "trials": {}, "predictions": {}, "run": {}}
    for output in (o for c in nb.cells for o in c.get("outputs", [])):
        told = output.get("metadata", {})
        if told.get("answer"):
            notes["answers"].append({key: told["answer"][key] for key in ANSWER})
            output["place"] = len(notes["answers"])
        if told.get("trials"):
            notes["trials"].update(told["trials"]["seconds"])
            notes["predictions"].update(told["trials"]["predictions"])
        notes["run"] = told.get("run") or notes["run"]
    return notes


# What a code cell is for, by what it holds; the others are the lesson, and open.
SIDE_LINES = (("imports", r"(?m)^(?:import|from) "), ("set-up", r"\bStudy\("),
              ("answer", r"\bstudy\.(?:answer|summary)\("),
              ("source", r"^figures\.show_source\("),
              ("figure", r"\bfigures\.(?:new_figure|save|same_limits|label_ends)\b|\baxes\["))


def purpose(cell):
    """Return what a code cell is for; "" is the lesson. A tag `lesson` or `folded` decides."""
    tags = cell.metadata.get("tags", [])
    if "parameters" in tags or "injected-parameters" in tags:
        return "parameters"
    found = next((name for name, sign in SIDE_LINES if re.search(sign, cell.source)), "")
    if re.search(r"(?m)^(?:def|class) ", cell.source) and found != "imports":
        found = ""
    return "" if "lesson" in tags else found or "code" * ("folded" in tags)


def prepare(nb):
    """Make a notebook ready for the template; return its cells and its sections: (id, title)."""
    sections, counts = [], [0, 0]

    def number(match):  # two sections may have the same title, not the same id
        level, title = int(match.group(1)), re.sub(r"</?a\b[^>]*>", "", match.group(2))
        counts[:] = [counts[0] + 1, 0] if level == 2 else [counts[0], counts[1] + 1]
        place = f"s{counts[0]}" + f".{counts[1]}" * (level == 3)
        if level == 2:
            sections.append((place, Markup(title).striptags()))
        return f'<h{level} id="{place}"><a href="#{place}">{title}</a></h{level}>'

    # papermill's own banner about a failed cell says what the page's head says.
    nb.cells = [c for c in nb.cells if "inputHidden" not in c.metadata
                and "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    for cell in coalesce(nb, {})[0].cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"<h1>.*?</h1>", "", markdown(cell.source), flags=re.DOTALL)
            cell.html = re.sub(r"<h([23])>(.*?)</h\1>", number, text, flags=re.DOTALL)
        elif cell.cell_type == "code":
            cell.purpose = purpose(cell)
    return nb.cells, sections


def save_page(out, name, **data):
    """Fill in the template and write a page, without private folders and unseen characters."""
    folders = [re.escape(str(f)) for f in (ROOT, out.parent, Path.home()) if len(f.parts) > 1]
    private = rf"(?<![\w+/])({'|'.join(folders)})/"  # not within base64
    text = spell(re.sub(private, "", TEMPLATE.render(name=name, **data)))
    files.write_atomically(str(out / (name + ".html")), text.encode("utf-8", "replace"))


def write_page(out, titles, name, row, nb, given, log=""):
    """Write a notebook's page; note its parameters, and what it shows for the index, in its row.

    When there can be no page, the notebook has failed: that is noted as well.
    """
    data = {"titles": titles, "row": row, "given": given, "log": log, "profile": row["profile"],
            "executed": (out / "notebooks" / (name + ".ipynb")).exists()}
    row.update(parameters=given, **take_notes(nbformat.v4.new_notebook()))
    try:
        notes = take_notes(nb)
        cells, sections = prepare(nb)
        save_page(out, name, cells=cells, sections=sections, notes=notes, **data)
        row.update(notes)
    except Exception as error:  # noqa: BLE001 - one odd output must not cost the other pages
        row.update(status="failed", reason=f"no page: {type(error).__name__}: {error}")
        save_page(out, name, **data)


environment = Environment(loader=FileSystemLoader(str(ROOT)), autoescape=True)
environment.filters.update(show_error=show_error, highlight=Highlight2HTML(), dress=dress,
                           one_line=one_line)
environment.globals.update(python=platform.python_version())
TEMPLATE = environment.get_template("report.html.j2")
