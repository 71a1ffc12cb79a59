"""lm-evaluation-harness with this engine as its model, on tasks of a local file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.integrations.test_documentation import examples
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, SamplingParams
from vas_engine.errors import InvalidArgumentError
from vas_engine.model import CausalLM
from vas_engine.values.artifact import save_value
from vas_engine.values.value_model import ValueModel

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="needs pip install 'vas-engine[lm-eval]'")

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: byte_perplexity}]
""",
    "text": """
output_type: generate_until
doc_to_text: "{{question}} Answer:"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e", "?"], max_gen_toks: 30, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a value for it, a task of each type and their documents."""
    root = tmp_path_factory.mktemp("lm_eval")
    tokenizer = byte_tokenizer(pad_token="<end>", chat_template=CHAT)
    for part, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed=seed, max_positions=256).save_pretrained(root / part)
        tokenizer.save_pretrained(root / part)
    lm = CausalLM.load(root / "model")
    value = ValueModel.create(root / "other", lm, ["kind"], tokenizer)
    with torch.no_grad():
        value.heads.output.weight.mul_(20)
    save_value(root / "value", value, tokenizer)
    documents = [
        {
            "question": f"What is {a} plus {b}?",
            "choices": [str(a + b), str(a - b), "none", "nine"],
            "text": f"It is said that {a} and {b} make {a + b}. " * (2 + 3 * a),
        }
        for a in range(1, 5)
        for b in (2, 7)
    ]
    (root / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    (root / "tasks").mkdir()
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {root / 'documents.jsonl'}}}}}\n"
        text = f"task: local_{name}\ntest_split: test\n{data}{text}"
        (root / "tasks" / f"local_{name}.yaml").write_text(text, encoding="utf-8")
    return root


def evaluate(folder: Path, model: str, **options) -> dict[str, list]:
    """What a model answered: task -> responses, document by document."""
    from lm_eval.tasks import TaskManager

    import vas_engine.integrations.lm_eval  # noqa: F401  # puts `vas` on the harness's list

    found = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(folder / "model"), "dtype": "float32", **options},
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(folder / "tasks")),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )
    samples = {name: found["samples"][f"local_{name}"] for name in TASKS}
    return {name: [sample["resps"] for sample in rows] for name, rows in samples.items()}


def test_without_values_as_transformers(folder) -> None:
    """Likelihoods, also of texts longer than the model's window, greedy flags and texts are those of lm-eval's `hf`."""
    theirs, ours = evaluate(folder, "hf"), evaluate(folder, "vas")
    assert ours["text"] == theirs["text"]
    assert len({str(answer) for answer in ours["text"]}) > 1
    for name in ("choice", "rolling"):
        for mine, other in zip(ours[name], theirs[name], strict=True):
            (a, b) = (torch.tensor(r, dtype=torch.float64) for r in (mine, other))
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def guided(folder):
    from vas_engine.integrations.lm_eval import GuidedLM

    return GuidedLM(
        str(folder / "model"), f"kind:{folder / 'value'}", "kind=3", num_candidates=6, dtype="float32", device="cpu"
    )


class Request:
    def __init__(self, *args) -> None:
        self.args = args


def test_guided_likelihoods_are_of_the_guided_policy(guided) -> None:
    plain, steered = guided.loglikelihood([Request("one", " two"), Request("", "x")]), []
    tokens = [((None), [40, 41], [token]) for token in range(257)]
    steered = guided._loglikelihood_tokens(tokens)
    assert sum(math.exp(log_prob) for log_prob, _ in steered) == pytest.approx(1.0, abs=1e-5)
    assert len(plain) == 2
    params = SamplingParams(values={"kind": 3.0}, num_candidates=6, max_tokens=5, seed=3, logprobs=0)
    drawn = guided.llm.generate([[40, 41]], params, use_tqdm=False)[0].outputs[0]
    ((log_prob, _),) = guided._loglikelihood_tokens([(None, [40, 41], drawn.token_ids)])
    assert log_prob == pytest.approx(drawn.cumulative_tilted_logprob, abs=1e-4)
    # A text too long for the model: its context is cut, and the last place still has room for candidates.
    assert len(guided._loglikelihood_tokens([(None, list(range(200)) * 2, [1, 2])])) == 1


def test_guided_texts_are_the_engine_s(guided, folder) -> None:
    settings = {"until": ["e", "<end>"], "max_gen_toks": 20, "do_sample": True, "temperature": 0.7, "seed": 5}
    texts = guided.generate_until([Request("Once", settings), Request("Once", {**settings, "do_sample": False})])
    llm = LLM(str(folder / "model"), {"kind": str(folder / "value")}, dtype="float32", device="cpu")
    params = SamplingParams(values={"kind": 3.0}, num_candidates=6, max_tokens=20, stop="e", seed=5, temperature=0.7)
    outputs = llm.generate(["Once"] * 2, [params, params.replace(temperature=0.0)], use_tqdm=False)
    assert texts == [output.outputs[0].text for output in outputs]
    plain = llm.generate(["Once"] * 2, [p.replace(values={}) for p in (params, params)], use_tqdm=False)
    assert texts[0] != plain[0].outputs[0].text
    # A context longer than the model leaves room for is cut on the left.
    long = guided.generate_until([Request("ab" * 200, {"until": [], "max_gen_toks": 20})])
    short = guided.generate_until([Request("ab" * 118, {"until": [], "max_gen_toks": 20})])
    assert long == short


def test_chat_and_special_tokens(guided) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert guided.apply_chat_template(turns) == "<system>Be kind.<user>Hi<go>"
    assert guided.chat_template(True) == CHAT
    settings = {"until": ["<end>", "x", ""], "max_gen_toks": 4}
    assert guided._read_settings(settings).stop_token_ids == (256,)
    assert guided._read_settings(settings).stop == ("x",)
    assert guided.tok_encode("<end>a", None) == [256, 97]


def test_errors(folder, guided) -> None:
    from vas_engine.integrations.lm_eval import GuidedLM

    model, value = str(folder / "model"), str(folder / "value")
    with pytest.raises(InvalidArgumentError, match="give both"):
        GuidedLM(model, f"kind:{value}")
    with pytest.raises(InvalidArgumentError, match="give both"):
        GuidedLM(model, weights={"kind": 1})
    with pytest.raises(InvalidArgumentError, match="kind"):
        GuidedLM(model, {"kind": value}, {"kindness": 1.0})
    with pytest.raises(InvalidArgumentError, match="name=number"):
        GuidedLM(model, {"kind": value}, "kind:1")
    with pytest.raises(InvalidArgumentError, match="beams"):
        guided.generate_until([Request("Once", {"until": [], "max_gen_toks": 4, "num_beams": 4})])
    with pytest.raises(InvalidArgumentError, match="no room"):
        guided.generate_until([Request("Once", {"until": [], "max_gen_toks": 256})])
    with pytest.raises(InvalidArgumentError, match="top_q"):
        guided.generate_until([Request("Once", {"until": [], "max_gen_toks": 4, "top_q": 0.5})])


def test_command(folder) -> None:
    """The harness's own command line; every model of its list is still there."""
    args = f"pretrained={folder / 'model'},values=kind:{folder / 'value'},weights=kind=3,dtype=float32"
    command = [sys.executable, "-m", "vas_engine.integrations.lm_eval", "--tasks", "local_text"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--limit", "2"]
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    vas = subprocess.run(
        [*command, "--model", "vas", "--model_args", args], env=environment, capture_output=True, text=True
    )
    assert vas.returncode == 0, vas.stderr
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text())
    assert results["results"]["local_text"]["exact_match,none"] == 0.0
    assert results["config"]["model"] == "vas"
    wrong = subprocess.run([*command, "--model", "vass"], env=environment, capture_output=True, text=True)
    assert "vas, " in wrong.stderr or ", vas" in wrong.stderr
    assert "hf-auto" in wrong.stderr


def test_documentation(folder) -> None:
    task = yaml.safe_load((folder / "tasks" / "local_text.yaml").read_text())
    space = {"MODEL": str(folder / "model"), "VALUE": str(folder / "value"), "TASKS": [task]}
    exec(examples("lm_eval.md"), space)
    assert "exact_match,none" in space["results"]["results"]["local_text"]
