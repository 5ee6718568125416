"""The report in a real browser: it shows everything, its script runs, and nothing is complained of."""

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import write_run

from tools.report import main

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr",
)  # fmt: skip
PROBE = """
addEventListener("load", () => setTimeout(() => {
  const svg = document.querySelector("svg[data-chart]"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.9, clientY: box.top + 20 }));
  document.querySelector("img.zoom").click();
  const wide = document.documentElement.scrollWidth > innerWidth;
  const broken = [...document.images].filter(image => !image.dataset.ready && image.src && !image.naturalWidth).length;
  document.body.dataset.seen = JSON.stringify({
    tip: document.querySelector(".tip").textContent, open: document.querySelector("dialog").open, wide, broken,
    charts: document.querySelectorAll("svg[data-chart]").length,
  });
}, 50));
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_page_works_in_a_browser(tmp_path: Path, small_sdxl_modules: SimpleNamespace, small_sdxl_file: Path) -> None:
    output = write_run(tmp_path / "out", small_sdxl_modules, small_sdxl_file)
    main([str(output), "--open", "no"])
    page = (output / "net-run" / "report.html").read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"  # the same page with a script of ours, which its policy would keep from running
    probed.write_text(re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"<script>{PROBE}</script></body>"))
    for path in (output / "net-run" / "report.html", probed):
        found, said = opened(path, tmp_path)
        assert 'data-ready="yes"' in found, "the script ran to its end, under the page's own policy"
        assert "CONSOLE" not in said and "Refused" not in said
    assert '"open":true,"wide":false,"broken":0' in found.replace("&quot;", '"')
    assert re.search(r'"tip":"step \d', found.replace("&quot;", '"'))


def opened(path: Path, folder: Path) -> tuple[str, str]:
    """The document after it was loaded, and what the browser said."""
    assert BROWSER is not None
    command = [BROWSER, *QUIET, f"--user-data-dir={folder / path.stem}", "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr
