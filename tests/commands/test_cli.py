"""The command: train, keys, doctor, version, and how errors and interruptions reach the shell."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app
from fastlora.commands import diagnosis
from tests.support.full_disk import no_file_beyond

COMMAND = [sys.executable, "-m", "fastlora"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(fastlora.__file__).parents[1])}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for a random Llama of one layer."""
    root = tmp_path_factory.mktemp("recipe")
    words = ["<end>", "a", "b", "c"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(root)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        eos_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root)
    (root / "train.jsonl").write_text('{"text": "a b c"}\n{"text": "b c a b"}\n')
    path = root / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {root}\ntrain_file: {root / 'train.jsonl'}\nuse_cpu: true\nbf16: false\n"
        "r: 2\nmax_steps: 2\nsave_steps: null\n"
    )
    return path


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_train_with_overrides(recipe: Path, tmp_path: Path) -> None:
    code, text = invoke("train", str(recipe), "--set", f"output_dir={tmp_path}/run", "--set", "max_steps=3")
    assert code == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert f"{tmp_path}/run" in text.replace("\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "max_step=3"], "unknown key 'max_step'; did you mean 'max_steps'?"),
        (["--set", "max_steps"], "expected key=value"),
        (["--set", "learning_rate=[fast]"], "learning_rate: expected a number"),
        (["--resume", "--set", "output_dir=/nonexistent/run"], "holds no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_code_2(recipe: Path, words: list[str], message: str) -> None:
    code, text = invoke("train", str(recipe), *words)
    assert code == 2
    assert message in text
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such recipe file"),
        ("a: [1,\n  b: {", "not valid YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: !!timestamp x", "not valid YAML"),
        ("packing: true", "unknown key 'packing': padding_free puts"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_text(content)
    code, text = invoke("train", str(path))
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1


def test_a_full_disk_is_one_line(recipe: Path, tmp_path: Path) -> None:
    words = ("train", str(recipe), "--set", f"output_dir={tmp_path}/run", "--set", "save_steps=1")
    with no_file_beyond(2000):  # enough for the metrics, not for an adapter
        code, text = invoke(*words)
    assert code == 2
    last = text.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}/run/.checkpoint-1.part/adapter_model.safetensors: File too large; No ")
    assert "Traceback" not in text
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "recipe.yaml"]


def test_python_m_fastlora_train_and_the_run_is_not_overwritten(recipe: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "train", str(recipe), "--set", f"output_dir={tmp_path}/run"]
    first = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "run" / "loss.png").is_file()
    again = invoke(*words[len(COMMAND) :])
    assert again[0] == 2
    assert "already holds a run" in again[1]


def test_a_run_goes_on_when_nobody_reads_what_it_says(recipe: Path, tmp_path: Path) -> None:
    words = [*COMMAND, "train", str(recipe), "--set", f"output_dir={tmp_path}/run", "--set", "logging_steps=1"]
    process = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(timeout=100) == 0, errors
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_interrupted_from_the_shell_and_resumed(recipe: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    words = [*COMMAND, "train", str(recipe), "--set", f"output_dir={out}", "--set", "max_steps=2000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = signal.signal(number, signal.SIG_DFL)  # a child inherits what is ignored, as under nohup
    process = subprocess.Popen(words, env=ENVIRONMENT, text=True, **pipes)
    signal.signal(number, before)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    made = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert made == list(range(1, len(made) + 1))
    assert (out / f"checkpoint-{len(made)}" / "trainer_state.json").is_file()
    assert f"Stopped by {number.name} after step {len(made)} of 2000" in text
    assert f"continue with: fastlora train {recipe} --set output_dir={out} --set max_steps=2000 --resume" in text


def test_help_is_fast_and_light() -> None:
    code = (
        "import sys, runpy; sys.argv = ['fastlora', '--help']\n"
        "try: runpy.run_module('fastlora', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'matplotlib', 'peft', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for command in ("train", "keys", "doctor", "version"):
        assert command in done.stdout


def test_version() -> None:
    assert invoke("version") == (0, f"{fastlora.__version__}\n")
    assert invoke("--version") == (0, f"{fastlora.__version__}\n")


def test_keys_lists_every_key() -> None:
    code, text = invoke("keys")
    assert code == 0
    for key in ("model_name_or_path", "learning_rate", "lora_alpha", "per_device_train_batch_size"):
        assert key in text


def test_doctor_names_versions_devices_and_backends() -> None:
    code, text = invoke("doctor")
    assert code == 0
    for word in ("python", "torch", "triton", "peft", "bitsandbytes", "cpu", "C++ library"):
        assert word in text
    assert str(diagnosis.version_of("torch")) in text  # not torch.__version__, which may name a build too


def test_doctor_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    known = diagnosis.version_of
    monkeypatch.setattr(diagnosis, "version_of", lambda package: None if package == "peft" else known(package))
    monkeypatch.setattr(diagnosis.cpu, "status", lambda: (False, "not built: run make"))
    found = diagnosis.diagnose()
    assert any("pip install peft" in line for line in found.advice)
    assert "not built: run make" in found.advice
    assert [f.good for f in found.versions if f.what == "peft"] == [False]


def test_doctor_prints_brackets_whole() -> None:
    found = diagnosis.Finding(
        "a[b]", "fastlora-kernels[train] and [red]", False, "pip install 'fastlora-kernels[train]'"
    )
    console = Console(file=io.StringIO(), width=200)
    diagnosis.show(diagnosis.Diagnosis(versions=[found]), console)
    text = console.file.getvalue()
    for whole in (found.what, found.found, found.advice):
        assert whole in text


def test_doctor_reports_a_backend_that_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "abacus")
    code, text = invoke("doctor")
    assert code == 0
    assert "FASTLORA_BACKEND must be one of" in " ".join(text.split())
