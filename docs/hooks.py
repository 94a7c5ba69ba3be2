"""What the build adds to the pages: one page for each operator, links to all of them, and formulas as pictures."""

import inspect
import re
from html import escape

from pruneopd_kernels.ops import OPERATORS

FORMULA = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INK = "#010203"  # stands for the colour of the page's text, light or dark


def page(op):
    """Return one operator's page: what it is for, the function, the result."""
    purpose = inspect.getdoc(op.module).partition(": ")[2]
    objects = [op.name, *([op.result.__name__] if op.result else [])]
    blocks = [f"::: {op.module.__name__}.{name}\n" for name in objects]
    return "\n".join([f"# {op.name}\n\n{purpose[0].upper()}{purpose[1:]}\n", *blocks])


def on_config(config):
    for entry in config.nav:
        if isinstance(entry, dict) and "Operators" in entry:
            entry["Operators"] = [*(f"operators/{name}.md" for name in OPERATORS), *entry["Operators"]]
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for name, op in OPERATORS.items():
        files.append(File.generated(config, f"operators/{name}.md", content=page(op)))
    return files


def on_page_markdown(markdown, page, config, files):
    for words, losses in (("{operators}", False), ("{losses}", True), ("{results}", None)):
        ops = [op for op in OPERATORS.values() if losses in (None, bool(op.saved))]
        names = [
            (op, op.result.__name__ if losses is None else op.name) for op in ops if losses is not None or op.result
        ]
        links = ", ".join(f"[`{name}`][{op.module.__name__}.{name}]" for op, name in names)
        markdown = markdown.replace(words, links)
    return FORMULA.sub(lambda found: picture(found[1].strip()), markdown)


def picture(formula):
    """Return a formula in TeX as inline SVG, which needs no script and no network."""
    import io

    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.mathtext import math_to_image

    file = io.StringIO()
    with matplotlib.rc_context({"mathtext.fontset": "cm", "savefig.transparent": True, "svg.hashsalt": formula}):
        math_to_image(f"${formula}$", file, prop=FontProperties(size=13), format="svg", color=INK)
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"\s*\n\s*", " ", svg.strip()).replace(INK, "currentColor")
    return f'<p class="formula" role="img" aria-label="{escape(formula)}">{svg}</p>'
