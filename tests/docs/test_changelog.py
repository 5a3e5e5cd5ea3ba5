"""The changelog and the package must speak of the same version."""

from __future__ import annotations

import re
from pathlib import Path

import auto_gptq

CHANGELOG = Path(__file__).resolve().parents[2] / "CHANGELOG.md"


def test_newest_version_in_the_changelog_is_that_of_the_package() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", CHANGELOG.read_text(encoding="utf-8"), re.M)
    assert versions, "CHANGELOG.md has no heading of the form '## [0.9.0] - date'"
    assert versions[0] == auto_gptq.__version__
