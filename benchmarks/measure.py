"""What every benchmark needs: a description of where it ran, and a file to leave the figures in."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Describe device, versions, date and commit."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{platform.processor()} CPU",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
    }


def save(name: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write figures as JSON, the environment first."""
    path = (folder or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment()} | content, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Lay rows of equal keys out as a Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([_text(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _commit() -> str:
    """Give COMMIT, where code was carried to another machine, else what is checked out."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()
