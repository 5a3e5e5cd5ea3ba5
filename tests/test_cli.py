"""The command line, on tiny models in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_gptq import BaseQuantizeConfig
from auto_gptq.cli import main
from tests.tiny import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.zoo import tiny_of


def test_inspect_shows_steps_shapes_and_the_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_of("qwen3_moe").save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--group-size", "32"]) == 0
    shown = capsys.readouterr().out
    assert "2 blocks in `model.layers`, found by running one block" in shown
    assert "self_attn.q_proj self_attn.k_proj self_attn.v_proj   [64 → 32, 64 → 64] x 6" in shown
    assert "mlp.experts.*.gate_proj mlp.experts.*.up_proj   [64 → 96] x 16" in shown
    assert '        "mlp.experts.*.down_proj",' in shown
    assert "  lm_head" in shown


def test_inspect_says_what_odd_shapes_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(intermediate_size=80).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--group-size", "64"]) == 0
    shown = capsys.readouterr().out
    assert "a row of the table" in shown and "Architecture(" not in shown
    assert "dense in the blocks" in shown
    assert r"-:model\.layers\.\d+\.mlp\.down_proj$" in shown


def test_a_model_is_quantized_measured_and_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, packed, converted = tmp_path / "dense", tmp_path / "packed", tmp_path / "v2"
    tiny_model().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 200)
    settings = ["--group-size", "32", "--rows", "4", "--length", "32", "--data", str(text)]
    assert main(["quantize", str(dense), str(packed), *settings, "--dtype", "float32"]) == 0
    assert "14 linears quantized" in capsys.readouterr().out
    assert BaseQuantizeConfig.from_pretrained(packed).correction == 0.75  # the default preset's
    arguments = ["evaluate", str(packed), "--data", str(text), "--window", "32", "--device", "cpu"]
    assert main(arguments) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["convert", str(packed), str(converted), "--format", "gptq_v2"]) == 0
    assert '"checkpoint_format": "gptq_v2"' in (converted / "quantize_config.json").read_text()


def test_errors_of_users_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("auto-gptq: vit isn't supported yet")


def test_kernels_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "--device", "cpu"]) == 0
    assert "runs" in capsys.readouterr().out


def test_errors_come_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong folder or size ended a run of hours, and tracebacks met a wrong path or device."""
    text, broken, model = tmp_path / "text.txt", tmp_path / "broken", tmp_path / "model"
    text.write_text("the quick brown fox")
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type"')
    tiny_model().save_pretrained(model)
    out, here = str(tmp_path / "out"), str(model)
    capsys.readouterr()
    for arguments, message in (
        (["quantize", here, str(text)], "is a file"),
        (["quantize", here, out, "--max-shard-size", "abc"], "max_shard_size is 'abc'"),
        (["quantize", str(tmp_path / "none"), out], "is neither a folder"),
        (["quantize", here, out], "has no usable tokenizer"),
        (["evaluate", str(tmp_path)], "has no config.json"),
        (["inspect", str(broken)], "cannot be used: It looks like the config file"),
        (["kernels", "--device", "nope"], "device is 'nope'"),
        (["kernels", "--group-size", "0"], "group_size is 0"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("auto-gptq: ") and message in error
    tiny_tokenizer().save_pretrained(model)
    assert main(["quantize", here, out, "--data", str(text)]) == 1
    assert "A row of 2048 tokens cannot be filled with a text of" in capsys.readouterr().err
    assert main(["quantize", here, out, "--data", str(tmp_path / "no.json")]) == 1
    assert "There is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", here, out, "--rows", "-1"])
    assert "'-1' is not a whole number from 1 on" in capsys.readouterr().err
