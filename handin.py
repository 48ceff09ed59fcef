"""Write the one file to hand in: helpers.py behind the modules that it imports.

    python handin.py build/classifier.py     # or: make classifier
"""
import ast
import re
import sys
from pathlib import Path

# Each needs those before it.
MODULES = "files", "runtime", "cpu", "gpu", "checkpoints", "run", "helpers"
# What the joined file does not need: imports of its own parts, and the check that they are there.
OWN = re.compile(r"^from (?:__future__|files|runtime|cpu|gpu|checkpoints|run) import "
                 r"(?:\([^)]*\)|[^\n(]*)\n"
                 r"|^try:\n    import checkpoints.*\n(?:except|    ).*\n(?:    .*\n)*", re.M)
HEAD = '''"""Fine-tune BERT on film reviews: pretrain, train, classify, in one file to hand in.

Joined by handin.py; change these instead:
%s.
"""
from __future__ import annotations
''' % ", ".join(name + ".py" for name in MODULES)
INNER = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # own names


def bindings(node, own):
    """Yield (name, what it stands for) for all that a module binds at its top level."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield child.name, own
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id, own
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            for alias in child.names:
                root = alias.name.split(".")[0]
                yield alias.asname or root, (getattr(child, "module", None),
                                             alias.name if alias.asname else root)
        elif not isinstance(child, INNER):
            yield from bindings(child, own)


def imported(tree):
    """Return the names of all modules that are imported, within functions too."""
    return {name for node in ast.walk(tree) for name in (
        [node.module] if isinstance(node, ast.ImportFrom) else
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])}


def join(folder):
    """Return the modules of a folder as the text of one file; exit where they do not fit."""
    parts, meanings = [HEAD], {}
    for module in MODULES:
        part = OWN.sub("", (folder / (module + ".py")).read_text(encoding="utf-8"))
        tree = ast.parse(part)
        for name in sorted(imported(tree).intersection(MODULES)):
            sys.exit(f"handin.py: {module}.py imports {name} otherwise than by `from {name} "
                     f"import NAMES` at the top level, which cannot be joined")
        for name, meaning in dict(bindings(tree, module)).items():
            other, before = meanings.setdefault(name, (module, meaning))
            if before != meaning:
                sys.exit(f"handin.py: {other}.py and {module}.py both define {name}: rename one")
        parts.append(part)
    return "\n\n".join(parts)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    text = join(Path(__file__).resolve().parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode("utf-8"))
    print(target)
