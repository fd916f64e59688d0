"""DVC's plots without a network: a template for its HTML page with the chart library in it, instead of its address.

The library (Vega) comes from the package vl-convert-python, which bundles it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cdm.errors import CdmError

TEMPLATE = "plots/offline.html"
"""In the folder .dvc, to which DVC's setting is relative."""
VEGA_LITE = "5.20"
"""Vega-Lite of the major version that DVC's templates are written for."""
PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
{{refresh_tag}}
<title>DVC Plot</title>
<script>
(function () {{
{library}
}})();
(function (embed) {{
  // A file of figures is among the plots, and has nothing to draw.
  window.vegaEmbed = (place, spec) => Object.keys(spec).length ? embed(place, spec) : null;
}})(window.vegaEmbed);
</script>
<style>body {{ font-family: system-ui, sans-serif; margin: 24px; }} img {{ max-width: 100%; }}</style>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""


def set_up(folder: Path = Path(".dvc")) -> Path:
    """Write the template, and tell DVC to use it here (in .dvc/config.local, which is not in Git).

    Raises CdmError where there is no DVC project, or the package is missing.
    """
    if not (folder / "config").is_file():
        raise CdmError(f"{folder}: no DVC project here: run it where dvc.yaml is")
    page = make_page(_library())
    path = folder / TEMPLATE
    path.parent.mkdir(exist_ok=True)
    path.write_text(page, encoding="utf-8")
    command = [sys.executable, "-m", "dvc", "config", "--local", "plots.html_template", TEMPLATE]
    done = subprocess.run(command, cwd=folder.parent, check=False, capture_output=True, text=True)
    if done.returncode:
        raise CdmError(f"dvc config: {' '.join(done.stderr.split())}")
    return path


def make_page(library: str) -> str:
    """The template with the text of the library, which makes `window.vegaEmbed`."""
    return PAGE.format(library=library)


def _library() -> str:
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise CdmError(
            "vl-convert-python, which has the chart library, is missing: pip install -e '.[plots]'"
        ) from None
    return str(javascript_bundle(vl_version=VEGA_LITE))
