"""The tests that need a GPU, with what came of each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from benchmarks.gpu import ROOT
from benchmarks.gpu.scale import Scale


def measure(_: Scale, note: Any) -> None:
    """Runs them; RuntimeError where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "-W", "default"]
        command += ["-p", "no:cacheprovider", "--durations=0", f"--junitxml={report}"]
        done = subprocess.run(command, cwd=ROOT, check=False)  # its output is this part's log
        if report.is_file():
            note(cases=cases(report))
    if done.returncode:
        raise RuntimeError(f"pytest: exit code {done.returncode}")


def cases(report: Path) -> list[dict[str, Any]]:
    """Name, outcome, seconds and recorded figures of each test."""
    found: list[dict[str, Any]] = []
    for case in ET.parse(report).iter("testcase"):
        outcome = next((tag for tag in ("failure", "error", "skipped") if case.find(tag) is not None), "passed")
        figures = {each.get("name", ""): each.get("value") for each in case.iter("property")}
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        found.append({"name": name, "outcome": outcome, "seconds": float(case.get("time", 0)), **figures})
    return found
