"""The main job needs none of the optional libraries, and a feature that needs one says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What Python finds as None in sys.modules counts as not installed.
_BLOCK = "import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
_OPTIONAL = ("peft", "datasets", "triton", "matplotlib", "gguf", "lm_eval", "rouge", "optimum")

_MAIN_JOB = """
import torch
from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from auto_gptq.calibration.blocks import get_dataloader
from auto_gptq.evaluation.perplexity import Perplexity
from auto_gptq.evaluation.tasks import LanguageModelingTask, TextSummarizationTask
from tests.tiny import tiny_examples, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
dense, packed = sys.argv[1] + "/dense", sys.argv[1] + "/packed"
tiny_model().save_pretrained(dense)
tokenizer = tiny_tokenizer()
model = AutoGPTQForCausalLM.from_pretrained(dense, BaseQuantizeConfig(bits=4, group_size=32))
model.quantize(tiny_examples())
model.save_quantized(packed)
model = AutoGPTQForCausalLM.from_quantized(packed, device="cpu")
ids = torch.tensor([[5, 6, 7]])
assert model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3).any()
open(dense + "/text.txt", "w").write("A text to measure. " * 20)
assert Perplexity(model, tokenizer, dense + "/text.txt").calculate_perplexity(32)
data = [{"a": "prompt", "b": "label"}]
for task in (LanguageModelingTask, TextSummarizationTask):
    assert task(model, tokenizer, data, "a", "b").run()
print("done")
"""


def _run(code: str, *arguments: str, blocked: tuple[str, ...] = _OPTIONAL) -> str:
    program = _BLOCK.format(blocked=blocked) + code
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_main_job_and_its_evaluation_run_without_them(tmp_path: Path) -> None:
    assert _run(_MAIN_JOB, str(tmp_path)).strip() == "done"


FEATURES = {
    "get_gptq_peft_model": (
        "from auto_gptq.integrations.peft import get_gptq_peft_model as f\n"
        "from tests.tiny import tiny_model\n"
        "f(tiny_model(), model_id='somewhere')",
        "pip install 'auto-gptq[peft]'",
    ),
    "GPTQLoraConfig": (
        "from auto_gptq.integrations.peft import GPTQLoraConfig",
        "pip install 'auto-gptq[peft]'",
    ),
    "wikitext": (
        "from auto_gptq.evaluation.perplexity import Perplexity\nPerplexity(None, None)",
        "pip install 'datasets'",
    ),
    "SmolLM2": (
        "from pathlib import Path\n"
        "from auto_gptq.evaluation.smollm2 import unpack_smollm2\n"
        "unpack_smollm2('/nowhere/folder', Path('/nowhere/model.gguf'))",
        "pip install 'auto-gptq[gguf]'",
    ),
}


@pytest.mark.parametrize(("code", "advice"), FEATURES.values(), ids=FEATURES)
def test_a_feature_that_needs_one_says_what_to_install(code: str, advice: str) -> None:
    indented = code.replace("\n", "\n    ")
    probe = f"try:\n    {indented}\nexcept ImportError as error:\n    print(error)"
    assert advice in _run(probe)


def test_importing_the_features_module_needs_nothing() -> None:
    _run("import auto_gptq.integrations.peft, auto_gptq.evaluation.tasks")
