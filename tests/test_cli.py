"""`vas`: help without heavy imports, one line an error, exit codes, clean pipes, everything in --json."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, SamplingParams, cli
from vas_engine.cli import COMMANDS, FAILED, INTERRUPTED, OK, USAGE, main
from vas_engine.commands.options import read_values
from vas_engine.errors import InvalidArgumentError
from vas_engine.training import collect
from vas_engine.values.artifact import save_value
from vas_engine.values.config import default_config
from vas_engine.values.network import ValueNetwork

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
ROOT = Path(__file__).resolve().parents[1]
FAST = ["--device", "cpu", "--kv-cache-memory", "1MiB"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer(chat_template=TURNS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def value(model, tmp_path_factory) -> str:
    llm = LLM(model, device="cpu", kv_cache_memory="1MiB")
    torch.manual_seed(0)
    network = ValueNetwork(default_config("reader", llm.lm, ["kind"])).bind(llm.lm, llm.tokenizer)
    return str(save_value(tmp_path_factory.mktemp("value"), network, llm.tokenizer))


def vas(capsys, *words) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out, err


def tokens(record: dict) -> list[int]:
    return record["outputs"][0]["token_ids"]


def spawn(*words, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "vas_engine.cli", *words], **(pipes | options))


def shown_commands() -> list[str]:
    """Whole commands that the documents and --help show, each once: lines of a block, continued where they say so."""
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    texts = [page.read_text(encoding="utf-8") for page in pages]
    for name in COMMANDS:
        parsers = next(action.choices for action in cli._parser(name)._actions if action.choices)
        texts.append(parsers[name].epilog)
    pattern = re.compile(r"^(?:    |  |\$ |.*\| |[A-Z_]+=\w+ )*(vas [a-z]+.*?)(?: {3,}.*)?$", re.MULTILINE)
    joined = re.sub(r"\\\n *", "", "\n".join(texts))
    return sorted({shown for shown in pattern.findall(joined) if shown.split()[1] in COMMANDS and "`" not in shown})


def test_every_command_is_shown():
    assert {shown.split()[1] for shown in shown_commands()} == set(COMMANDS)


# -- the frame -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", shown_commands())
def test_commands_that_are_shown_are_understood(shown):
    words = shlex.split(shown, comments=True)[1:]
    end = next((place for place, word in enumerate(words) if word in ("|", ">")), len(words))
    assert "run" in cli._parser(words[0]).parse_args(words[:end])


def test_help_lists_commands_and_imports_nothing_heavy():
    code = "import sys\nfrom vas_engine.cli import main\nmain(['--help'])"
    code = code.replace("main(['--help'])", "\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("generate", "info", "collect", "train", "examples:"):
        assert name in out
    loaded = out.splitlines()[-1].split()
    assert "vas_engine.cli" in loaded
    assert not {"torch", "transformers", "numpy", "tqdm", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if cli._exists(command.module)])
def test_every_command_has_help_with_examples_and_json(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == OK
    out = capsys.readouterr().out
    assert "example" in out
    assert f"vas {name}" in out
    assert "--json" in out


def test_no_command_prints_help(capsys):
    code, out, _ = vas(capsys)
    assert code == OK
    assert "commands" in out


def test_wrong_usage_names_the_nearest_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["genrate", "x"])
    assert caught.value.code == USAGE
    assert "did you mean 'generate'" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "right"), [("--temprature", "--temperature"), ("--top_p=0.5", "--top-p")])
def test_an_unknown_option_names_the_nearest(wrong, right, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "m", "Hi", wrong, "1"])
    assert caught.value.code == USAGE
    assert f"unknown option {wrong.partition('=')[0]}; did you mean '{right}'?" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(cli, "import_module", missing)
    code, out, err = vas(capsys, "collect")
    assert (code, out) == (FAILED, "")
    assert "pip install 'vas-engine[train]'" in err
    assert len(err.splitlines()) == 1


def test_collect_asks_for_its_packages_before_it_samples(model, monkeypatch, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(LLM, "generate", lambda *_, **__: pytest.fail("sampled"))
    monkeypatch.setattr(collect, "sample_shards", lambda *_: pytest.fail("sampled"))
    words = ["--prompts", tmp_path / "prompts.txt", "--reward", "length", "--out", tmp_path / "out"]
    code, _, err = vas(capsys, "collect", model, *FAST, *words)
    assert code == FAILED
    assert "needs pyarrow; pip install 'vas-engine[train]'" in err
    assert not (tmp_path / "out").exists()


def test_limits_of_a_server_are_named_as_they_are_written(capsys):
    pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")
    for option in ("--max-body", "--max-n", "--max-candidates", "--max-logprobs", "--max-waiting", "--step-timeout"):
        code, _, err = vas(capsys, "serve", "nowhere", option, "0")
        assert code == FAILED
        assert f"{option}=0" in err


@pytest.mark.parametrize("command", ["collect", "demo", "evaluate"])
def test_a_folder_that_cannot_be_is_one_line(model, capsys, tmp_path, command):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ab\n")
    words = [] if command == "demo" else [model, *FAST, "--prompts", prompts, "--reward", "length"]
    out = prompts if command != "evaluate" else prompts / "out"
    code, _, err = vas(capsys, command, *words, "--out", out)
    assert code == FAILED
    assert "prompts.txt" in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("vas: error: ")


def test_an_error_is_one_line_unless_a_traceback_is_asked_for(capsys):
    code, out, err = vas(capsys, "generate", "/no/such/model", "Hi")
    assert (code, out) == (FAILED, "")
    assert err.startswith("vas: error: ")
    assert "/no/such/model" in err
    assert len(err.splitlines()) == 1
    with pytest.raises(InvalidArgumentError):
        main(["generate", "/no/such/model", "Hi", "--traceback"])


# -- generate ------------------------------------------------------------------------------------------------


def test_one_prompt_prints_its_completion_and_nothing_else_on_stdout(model, capsys):
    words = ["generate", model, "Hi", "--max-tokens", "20", "--seed", "3", "--ignore-eos", *FAST]
    code, out, err = vas(capsys, *words)
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    llm = LLM(model, device="cpu", kv_cache_memory="1MiB")
    expected = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0].text
    assert (code, out) == (OK, expected + "\n")
    assert "20 tokens" in err
    assert "seed 3" in err
    assert vas(capsys, *words, "--no-stream", "--quiet") == (OK, expected + "\n", "")
    assert vas(capsys, *words, "--echo", "--quiet") == (OK, "Hi" + expected + "\n", "")


def test_prompts_from_stdin_and_files_equal_those_from_arguments(model, capsys, monkeypatch, tmp_path):
    options = ["--max-tokens", "6", "--seed", "3", "--ignore-eos", "--json", "--quiet", *FAST]
    expected = [json.loads(line) for line in vas(capsys, "generate", model, "Hi", "Yo", *options)[1].splitlines()]
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("Hi\n\nYo\n", encoding="utf-8")
    lines.write_text('"Hi"\n{"prompt": "Yo", "params": {"max_tokens": 2}}\n', encoding="utf-8")
    from_text = [json.loads(line) for line in vas(capsys, "generate", model, "--file", text, *options)[1].splitlines()]
    assert [tokens(record) for record in from_text] == [tokens(record) for record in expected]
    from_lines = [
        json.loads(line) for line in vas(capsys, "generate", model, "--file", lines, *options)[1].splitlines()
    ]
    assert [tokens(record) for record in from_lines] == [tokens(expected[0]), tokens(expected[1])[:2]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    from_stdin = json.loads(vas(capsys, "generate", model, *options)[1])
    assert tokens(from_stdin) == tokens(expected[0])


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.yaml"])
def test_prompts_of_a_file_go_by_its_ending(model, capsys, tmp_path, name):
    texts = {".txt": "Hi\nYo", ".jsonl": '"Hi"\n"Yo"', ".json": '["Hi", {"prompt": "Yo"}]', ".yaml": "- Hi\n- Yo"}
    file = tmp_path / name
    file.write_text(texts[file.suffix], encoding="utf-8-sig")
    out = vas(capsys, "generate", model, "--file", file, "--json", "--max-tokens", "1", "--quiet", *FAST)[1]
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["Hi", "Yo"]


def test_prompts_may_stand_behind_options(model, capsys):
    options = ["--json", "--max-tokens", "1", "--quiet", *FAST]
    for words in (
        ["Hi", "Yo", *options],
        [*options, "Hi", "Yo"],
        ["Hi", *options, "Yo"],
        ["Hi", *options, "--", "-Yo"],
    ):
        code, out, _ = vas(capsys, "generate", model, *words)
        assert code == OK
        assert [json.loads(line)["prompt"].strip("-") for line in out.splitlines()] == ["Hi", "Yo"]
    with pytest.raises(SystemExit):
        vas(capsys, "info", "--json", model, "one more")
    assert "unrecognized arguments: one more" in capsys.readouterr().err


def test_json_holds_everything(model, value, capsys):
    words = [
        "generate",
        model,
        "Hi",
        "--json",
        "--logprobs",
        "2",
        "--report-kl",
        "--n",
        "2",
        "--max-tokens",
        "4",
    ]
    steer = ["--value", f"kind={value}", "--weight", "kind=3", "--logit-bias", "256=-inf", "--seed", "0"]
    code, out, _ = vas(capsys, *words, *steer, *FAST)
    assert code == OK
    record = json.loads(out)
    assert record["prompt"] == "Hi"
    assert record["params"]["values"] == {"kind": 3.0}
    assert len(record["outputs"]) == 2
    completion = record["outputs"][0]
    assert len(completion["values"]["kind"]) == len(completion["logprobs"]) == 4
    assert {"logprob", "tilted_logprob", "token", "rank", "token_id", "values"} == set(completion["logprobs"][0][0])
    assert completion["kl"] >= 0
    assert record["metrics"]["value_evaluations"] == 2 * 4 * 21


def test_show_values_prints_a_table_without_steering(model, value, capsys):
    plain = ["generate", model, "Hi", "--max-tokens", "5", "--seed", "3", "--ignore-eos", "--quiet", *FAST]
    text = vas(capsys, *plain)[1]
    code, out, _ = vas(capsys, *plain, "--value", f"kind={value}", "--show-values", "--logprobs", "0")
    assert code == OK
    assert out.startswith(text)
    table = [line.split("\t") for line in out[len(text) :].strip("\n").splitlines()]
    assert table[0] == ["token", "logprob", "tilted", "kind"]
    assert len(table) == 6
    assert all(float(row[1]) == float(row[2]) for row in table[1:])


def test_a_value_without_weight_is_pointed_out(model, value, capsys):
    _, _, err = vas(capsys, "generate", model, "Hi", "--max-tokens", "2", "--value", value, *FAST)
    assert "no --weight" in err
    assert "kind" in err


def test_chat(model, capsys):
    words = [
        "generate",
        model,
        "Hi",
        "--chat",
        "--system",
        "Be.",
        "--json",
        "--max-tokens",
        "2",
        "--quiet",
        *FAST,
    ]
    assert json.loads(vas(capsys, *words)[1])["prompt"] == "[system]Be.[user]Hi>"


def test_a_conversation_goes_on_where_it_ends(model, capsys, tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]
    lines = [json.dumps({"messages": said[:1]}), json.dumps({"messages": said})]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    words = ["generate", model, "--file", tmp_path / "chats.jsonl", "--json", "--max-tokens", "2", "--quiet", *FAST]
    found = [json.loads(line)["prompt"] for line in vas(capsys, *words)[1].splitlines()]
    assert found == ["[user]Hi>", "[user]Hi[assistant]Once"]


def test_a_bad_prompt_among_good_ones_fails_alone_with_exit_code_1(model, capsys):
    options = ["--max-tokens", "4", "--json", "--quiet", *FAST]
    code, out, err = vas(capsys, "generate", model, "Hi", "x" * 500, *options)
    good, bad = (json.loads(line) for line in out.splitlines())
    assert code == FAILED
    assert good["error"] is None
    assert len(good["outputs"][0]["token_ids"]) > 0
    assert bad["error"]["type"] == "InvalidArgumentError"
    assert "prompt 1" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Hi", "--temperature", "-1"], "temperature"),
        (["Hi", "--weight", "kind=2"], "--value"),
        (["Hi", "--weight", "kind"], "NAME=NUMBER"),
        (["Hi", "--weight", "kind=nan", "--value", "x"], "finite"),
        (["Hi", "--logit-bias", "a=b"], "ID=NUMBER"),
        (["Hi", "--file", "x.txt"], "not both"),
        (["--file", "/no/such/file.txt"], "cannot be read"),
        (["Hi", "--value", "a", "--value", "b"], "NAME=FOLDER"),
        (["Hi", "--value", "kind=/no/such/folder", "--weight", "kind=1"], "/no/such/folder"),
    ],
)
def test_bad_input(model, capsys, words, message):
    code, out, err = vas(capsys, "generate", model, *words, *FAST)
    assert (code, out) == (FAILED, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(("line", "message"), [("{", "is no JSON"), ("3", "must be a text"), ("", "holds no prompt")])
def test_bad_files(model, capsys, tmp_path, line, message):
    file = tmp_path / "p.jsonl"
    file.write_text(line)
    code, _, err = vas(capsys, "generate", model, "--file", file, *FAST)
    assert code == FAILED
    assert message in err


def test_ctrl_c_ends_with_130(tmp_path):
    tiny_llama(max_positions=200_000).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    words = ["generate", str(tmp_path), "Hi", "--ignore-eos", "--device", "cpu", "--kv-cache-memory", "64MiB"]
    process = spawn(*words)
    assert process.stdout.read(1)  # it writes, and has far to go
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "interrupted" in err
    assert "Traceback" not in err


def test_a_closed_pipe_is_no_traceback(model):
    read, write = os.pipe()
    os.close(read)
    process = spawn("generate", model, "Hi", "--max-tokens", "50", "--ignore-eos", *FAST, stdout=write)
    os.close(write)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 141
    assert "Traceback" not in err


# -- info ----------------------------------------------------------------------------------------------------


def test_info_describes_the_installation(capsys):
    code, out, _ = vas(capsys, "info", "--json")
    report = json.loads(out)["installation"]
    assert code == OK
    assert torch.__version__.startswith(report["torch"])  # which leaves the build (+cpu) out
    assert report["torch threads"] == torch.get_num_threads()
    assert report["sampler"].split()[0] in ("cpp", "reference")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sums = {"demo", "test", "dev"}  # of other extras
    assert set(report["extras"]) == set(project["optional-dependencies"]) - sums
    assert "sampler: " in vas(capsys, "info")[1]


def test_info_describes_a_model_and_its_value(model, value, capsys):
    code, out, _ = vas(capsys, "info", model, "--value", f"kind={value}", "--json", *FAST)
    report = json.loads(out)
    assert code == OK
    assert report["model"]["architecture"] == "LlamaForCausalLM"
    assert report["model"]["vocabulary"] == 257
    assert report["model"]["kv bytes per token"] == 2 * 2 * 2 * 8 * 4
    assert report["model"]["values"] == ["kind"]
    assert len(report["model"]["fingerprint"]["weights"]) == 64
    assert report["values"]["kind"]["kind"] == "reader"
    assert report["values"]["kind"]["heads"][0]["name"] == "kind"
    assert "kind" in vas(capsys, "info", "--value", value)[1]


def test_info_describes_a_checkpoint_of_another_project(model, capsys, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    save_file(head, tmp_path / "value_head.safetensors")
    code, out, _ = vas(capsys, "info", model, "--value", f"kind={tmp_path}", "--json", *FAST)
    assert code == OK
    assert json.loads(out)["values"]["kind"]["kind"] == "lookahead"
    code, _, err = vas(capsys, "info", "--value", tmp_path)
    assert code == FAILED
    assert f"vas info MODEL --value {tmp_path}" in err


def test_info_of_a_value_says_how_to_ask(value, capsys):
    code, _, err = vas(capsys, "info", value)
    assert code == FAILED
    assert f"is a value; write vas info --value {value}" in err


def test_info_says_when_a_value_does_not_fit(model, value, capsys, tmp_path):
    tiny_llama(seed=5).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    code, _, err = vas(capsys, "info", tmp_path, "--value", value, *FAST)
    assert code == FAILED
    assert "weights" in err


def test_read_values():
    assert read_values([]) is None
    assert read_values(["folder"]) == "folder"
    assert read_values(["a=x", "b=y=z"]) == {"a": "x", "b": "y=z"}
    with pytest.raises(InvalidArgumentError, match="taken"):
        read_values(["a=x", "a=y"])


def test_the_command_is_installed():
    script = Path(sys.executable).with_name("vas")
    if not script.exists():
        pytest.skip("the package is not installed as a command")
    out = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert out.startswith("vas_engine ")
