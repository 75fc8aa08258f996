"""The site, built by `nox -s docs`: these Markdown pages, with equations as MathML and a page for each source file.

Nothing of the package is imported, so neither torch nor the package has to be there. A reader's browser asks no
network for anything: equations are MathML, which browsers draw by themselves, and fonts are the browser's own.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

HERE = Path(__file__).parent
ROOT = HERE.parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lightdiff").rglob("*.py"))
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lightdiff/__init__.py").read_text(encoding="utf-8"))
assert VERSION is not None

project = "lightdiff"
version = release = VERSION[1]
copyright = ""
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["benchmarks/remarks.md", "recipe/remarks.md", "recipe/summary.md"]  # parts of generated pages
nitpicky = True
highlight_language = "none"
smartquotes_action = "qe"  # quotes and ellipses; two hyphens stay so, as they begin a flag

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # those that a repository browser gives, so that page.md#heading works in both

html_theme = "furo"
html_title = f"lightdiff {VERSION[1]}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False


# --- equations as MathML ------------------------------------------------------------------------------------------


def inline_math(writer: Any, node: nodes.math) -> None:
    """An equation in a line of text."""
    writer.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def block_math(writer: Any, node: nodes.math_block) -> None:
    """Equations that stand by themselves, side by side where there is room; a wide space lies between them."""
    parts = (mathml(node, "block", part) for part in node.astext().split(r"\qquad"))
    writer.body.append(f'<div class="math">{"".join(parts)}</div>\n')
    raise nodes.SkipNode


def mathml(node: nodes.Element, display: str, latex: str = "") -> str:
    """MathML of a node's LaTeX; a command that the converter does not know, it copies, and that is a warning."""
    latex = latex or node.astext()
    found: str = convert(latex, display=display)
    if unknown := re.findall(r"\\[A-Za-z]+", found):
        logging.getLogger(__name__).warning("LaTeX that is not known: %s", ", ".join(unknown), location=node)
    return found


# --- a page for each source file ----------------------------------------------------------------------------------


class SourceLinks(SphinxTransform):
    """Links to source files lead to their pages instead of a download."""

    default_priority = 500  # before Sphinx collects what is to be downloaded

    def apply(self, **kwargs: Any) -> None:
        """Replace the links of one page."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        up = "../" * self.env.docname.count("/")
        for node in list(self.document.findall(addnodes.download_reference)):
            name = os.path.relpath((folder / node["reftarget"]).resolve(), ROOT).replace(os.sep, "/")
            if name in SOURCES:
                uri = f"{up}{page_of(name)}.html"
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def page_of(name: str) -> str:
    """The page of a source file."""
    return f"source/{name.removesuffix('.py')}"


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for each file of the package."""
    for name in SOURCES:
        code = (ROOT / name).read_text(encoding="utf-8")
        body = app.builder.highlighter.highlight_block(code, "python", linenos=False)  # type: ignore[attr-defined]
        yield page_of(name), {"title": name, "body": f"<h1>{name}</h1>\n{body}"}, "page.html"


# --- nothing from a network ---------------------------------------------------------------------------------------

ELSEWHERE = r"""["']?(?:https?:)?//"""
REQUESTS = re.compile(rf"<(?!a\b)\w+\s[^>]*\b(?:src|href|srcset)={ELSEWHERE}[^>]*>|url\({ELSEWHERE}[^)]*\)")


def check_requests(app: Sphinx, exception: Exception | None) -> None:
    """Refuse a site one of whose pages, when opened, would ask a network for something; links are no such thing."""
    for page in sorted(Path(app.outdir).rglob("*.*ml")) + sorted(Path(app.outdir).rglob("*.css")):
        if found := REQUESTS.search(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page.name} asks a network for {found[0]}")


def setup(app: Sphinx) -> dict[str, Any]:
    """Tell Sphinx of all this."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))  # type: ignore[arg-type]
    app.add_transform(SourceLinks)
    app.connect("html-collect-pages", source_pages)
    app.connect("build-finished", check_requests)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
