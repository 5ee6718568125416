"""The look of the report (`page.css`), and the script that shows numbers under the pointer and pictures in full (`page.js`).

The page is whole without the script.
"""

import base64
import hashlib
from pathlib import Path

from library.data.inspection.page_style import STYLE


def style() -> str:
    """The style sheet: that of the dataset's page, and what the report has besides."""
    return STYLE + _beside("page.css")


def script() -> str:
    """The script."""
    return _beside("page.js")


def policy() -> str:
    """What a browser may do with the page: load nothing, and run no other script, whatever a caption or a prompt holds."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
