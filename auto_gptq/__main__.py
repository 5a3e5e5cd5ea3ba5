"""Run the command line: ``python -m auto_gptq``."""

from __future__ import annotations

from .cli import main

raise SystemExit(main())
