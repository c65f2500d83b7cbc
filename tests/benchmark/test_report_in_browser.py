"""The report as a real browser shows it; Chromium without a window, which must be on the PATH as chromium or chrome."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from benchmark_results import TRAINERS, toy_results

from nnunetv2_misfm.benchmark.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A window without a frame is at least 500 wide, so the page stands in a frame of the width in question
WRAPPER = """<!DOCTYPE html><body style="margin:0"><pre id="measured"></pre>
<iframe width="{width}" height="800" style="border:0" srcdoc="{page}"></iframe>
<script>
document.querySelector("iframe").addEventListener("load", event => {{
  const page = event.target.contentDocument, root = page.documentElement;
  const measure = () => ({{
    width: root.clientWidth,
    font: getComputedStyle(page.body).fontFamily,
    scrolls: Math.max(root.scrollWidth, page.body.scrollWidth),
    overflowing: Array.from(page.querySelectorAll(".scroll"), box => box.scrollWidth > box.clientWidth + 1 && [
      box.querySelector("img") !== null,
      getComputedStyle(box).backgroundAttachment,
      (box.closest("figure") || box).classList.contains("wide"),
    ]).filter(Boolean),
    images: Array.from(page.images, image => image.complete ? image.naturalWidth : 0),
    sticky: Array.from(page.querySelectorAll(".scroll"), box => {{
      if (!box.querySelector("table")) return true;
      box.scrollLeft = 10000;
      const first = box.querySelector("tbody th");
      return !first || Math.abs(first.getBoundingClientRect().left - box.getBoundingClientRect().left) < 3;
    }}),
  }});
  const closed = measure();
  page.querySelectorAll("details").forEach(details => details.open = true);
  document.getElementById("measured").textContent = JSON.stringify([closed, measure()]);
}});
</script>"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report with 13 classes of long names, a long sentence, and pictures."""
    folder = tmp_path_factory.mktemp("toy")
    classes = [f"class number {i} of thirteen" for i in range(1, 14)]
    results = toy_results(folder, TRAINERS, ("5", "all"), seeds=(0,), classes=classes, cases=4)
    results.notes.append("a/very/long/path" * 20)
    dataset = folder / "preprocessed" / results.grid.dataset
    dataset.mkdir(parents=True)
    labels = {"background": 0, **{name: i for i, name in enumerate(classes, start=1)}}
    (dataset / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(folder / "preprocessed"))
        return write_report(results, folder / "report").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_but_tables_and_figures_scrolls_sideways_and_every_image_is_shown(
    page: str, width: int, tmp_path: Path
) -> None:
    assert BROWSER is not None
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=html.escape(page)), encoding="utf-8")
    size = ("--window-size=1400,900", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}")
    run = subprocess.run(
        [BROWSER, *OPTIONS, *size, "--dump-dom", wrapper.as_uri()], capture_output=True, text=True, timeout=120
    )
    measured = re.search(r'<pre id="measured">(.+?)</pre>', run.stdout)
    assert measured, f"the browser measured nothing: {run.stderr[-500:]}"
    for state in json.loads(html.unescape(measured.group(1))):
        assert width - 20 <= state["width"] <= width  # a scroll bar may take the rest
        assert "Segoe UI" in state["font"]  # the style sheet was understood
        assert state["scrolls"] <= state["width"]
        assert len(state["images"]) == page.count("<img ") and min(state["images"]) > 100
        assert all(state["sticky"])
        assert state["overflowing"]  # 13 classes fit no window
        for is_figure, attachment, is_wide in state["overflowing"]:
            assert attachment.startswith("local, local, scroll, scroll")  # the shadow that tells of more
            assert not is_figure or (width < 600 and is_wide)
