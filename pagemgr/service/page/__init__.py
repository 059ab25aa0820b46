"""The page as one HTML document: style, scripts and plotting library in it, and a policy that allows just those.

uPlot (MIT) is here as its authors publish it, with its licence: ``uPlot.min.js``, ``uPlot.min.css``, ``uPlot.LICENSE``.
"""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

STYLES = ("uPlot.min.css", "page.css")
SCRIPTS = (("uPlot.min.js",), ("format.js", "map.js", "charts.js", "tables.js", "page.js"))
"""Each group becomes one element."""


def page() -> tuple[str, str]:
    """The HTML, and the content security policy to send with it."""
    style = "\n".join(map(_read, STYLES))
    scripts = ["\n".join(map(_read, group)) for group in SCRIPTS]
    html = _read("page.html")
    html = html.replace(
        "<!-- licence -->", f"<!--\nuPlot, the plotting library in this page:\n\n{_read('uPlot.LICENSE')}\n-->"
    )
    html = html.replace("<!-- style -->", f"<style>{style}</style>")
    html = html.replace("<!-- scripts -->", "\n".join(f"<script>{script}</script>" for script in scripts))
    policy = (
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return html, "; ".join(policy)


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
