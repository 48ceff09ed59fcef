"""The pages of a report: one for each notebook, and the index. Their look is in report.html.j2."""
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
from pygments.formatters import HtmlFormatter

import files
from assignment import best_accuracy, first_sentence, points_named, table_by_point

ROOT = Path(__file__).resolve().parent
STATES = "ok", "failed", "timeout", "interrupted", "not run"
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
    return re.sub(r'(href="[\w-]+)\.ipynb', r"\1.html", text)


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


def take_answers(nb):
    """Return the answers that a notebook has given; mark their outputs with a page's places."""
    answers = []
    for output in (o for c in nb.cells for o in c.get("outputs", [])):
        answer = output.get("metadata", {}).get("answer")
        if answer:
            answers.append({key: answer[key] for key in ANSWER})
            output["place"] = len(answers)
    return answers


def prepare(nb):
    """Make a notebook ready for the template; return its cells and the titles of its sections."""
    titles = []

    def number(match):  # two sections may have the same title, not the same id
        titles.append(Markup(match.group(1)).striptags())
        return f'<h2 id="s{len(titles)}">{match.group(1)}</h2>'

    # papermill's own banner about a failed cell says what the page's head says.
    nb.cells = [c for c in nb.cells if "inputHidden" not in c.metadata
                and "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    for cell in coalesce(nb, {})[0].cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"<h1>.*?</h1>", "", markdown(cell.source), flags=re.DOTALL)
            cell.html = re.sub(r"<h2>(.*?)</h2>", number, text, flags=re.DOTALL)
    return nb.cells, titles


def save_page(out, name, **data):
    """Fill in the template and write a page, without private folders and unseen characters."""
    folders = [re.escape(str(f)) for f in (ROOT, out.parent, Path.home()) if len(f.parts) > 1]
    private = rf"(?<![\w+/])({'|'.join(folders)})/"  # not within base64
    text = spell(re.sub(private, "", TEMPLATE.render(name=name, **data)))
    files.write_atomically(str(out / (name + ".html")), text.encode("utf-8", "replace"))


def write_page(out, titles, name, row, nb, given, log=""):
    """Write a notebook's page; note its parameters, and the answers that it shows, in its row.

    When there can be no page, the notebook has failed: that is noted as well.
    """
    data = {"titles": titles, "row": row, "given": given, "log": log, "profile": row["profile"]}
    row.update(parameters=given, answers=[])
    try:
        answers = take_answers(nb)
        cells, sections = prepare(nb)
        save_page(out, name, cells=cells, sections=sections, **data)
        row["answers"] = answers
    except Exception as error:  # noqa: BLE001 - one odd output must not cost the other pages
        row.update(status="failed", reason=f"no page: {type(error).__name__}: {error}")
        save_page(out, name, **data)


def write_index(out, titles, status, profile):
    """Write the index page and status.json; return a line that counts the states."""
    states = [status[name]["status"] for name in titles]
    counts = ", ".join(f"{states.count(s)} {s}" for s in STATES if s in states)
    answers = {name: status[name].get("answers", []) for name in titles}
    files.save_json(str(out / "status.json"), status)
    save_page(out, "index", titles=titles, status=status, profile=profile, counts=counts,
              answers=answers, best=best_accuracy(answers),
              points=table_by_point(answers, {name: titles[name].points for name in titles}))
    return f"{len(states)} pages: {counts}"


environment = Environment(loader=FileSystemLoader(str(ROOT)), autoescape=True)
environment.filters.update(show_error=show_error, highlight=Highlight2HTML())
environment.globals.update(python=platform.python_version(),
                           code_style=HtmlFormatter().get_style_defs(".highlight"))
TEMPLATE = environment.get_template("report.html.j2")
