"""The playground in headless Chromium, against `vas serve` with the shipped model and two random values."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import yaml

pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")
pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")

from playwright import sync_api

from tests.serving.conftest import proxying, serving, upstream
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM
from vas_engine.demo import model_path
from vas_engine.values.artifact import save_value
from vas_engine.values.config import HeadConfig, default_config
from vas_engine.values.network import ValueNetwork

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page has to do without a network
]
PROMPT = "Mara went to the harbour"
STDS = {"warm": 0.5, "size": 20.0}
ADMIN_KEY = "keeper"
WAIT = 60_000  # milliseconds after which something will not come


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `vas serve` with the values "warm" and "size" and an admin key."""
    folder = tmp_path_factory.mktemp("playground") / "value"
    llm = LLM(model_path(), device="cpu", kv_cache_memory="4MiB")
    torch.manual_seed(1)
    heads = [HeadConfig(name, std=std) for name, std in STDS.items()]
    network = ValueNetwork(default_config("side", llm.lm, heads)).bind(llm.lm)
    with torch.no_grad():
        network.heads.output.weight.mul_(12.0)
    save_value(folder, network, llm.tokenizer)
    command = [sys.executable, "-m", "vas_engine.cli", "serve", model_path(), "--value", folder]
    options = ["--served-model-name", "demo", "--port", "0", "--json", "--kv-cache-memory", "16MiB"]
    environment = os.environ | {"VAS_ADMIN_KEY": ADMIN_KEY}
    running = subprocess.Popen([*map(str, command), *options], stdout=subprocess.PIPE, text=True, env=environment)
    assert running.stdout is not None
    try:
        yield json.loads(running.stdout.readline())["url"]
    finally:
        running.terminate()
        running.communicate(timeout=60)
    assert running.returncode == 0


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and all that went on in it."""

    page: sync_api.Page
    url: str
    requests: list[sync_api.Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, fragment: str = "") -> Visit:
        self.page.goto(f"{self.url}/{fragment}")
        self.wait("ready")
        return self

    def wait(self, state: str, runs: int | None = None) -> None:
        run = "" if runs is None else f'[data-runs="{runs}"]'
        self.page.wait_for_selector(f'html[data-state="{state}"]{run}', timeout=WAIT)

    def run(self, runs: int = 1, state: str = "done", **settings) -> None:
        """Fills in the form and generates."""
        for name, setting in {"prompt": PROMPT, "seed": 3, "max-tokens": 20, **settings}.items():
            self.page.fill(f"#{name}", str(setting))
        self.page.keyboard.press("Control+Enter")
        self.wait(state, runs)

    def text(self, column: str) -> str:
        """What was generated; the mark at the end of a text is no part of it."""
        read = "list => [...list.children].map(t => t.querySelector('.end') ? '' : t.textContent).join('')"
        return self.page.locator(f"#{column} .tokens").evaluate(read)

    def bodies(self) -> list[dict]:
        return [request.post_data_json for request in self.requests if request.method == "POST"]

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")


@pytest.fixture
def visit(browser: sync_api.Browser) -> Iterator[Callable[..., Visit]]:
    """Opens pages; none may have reached for another host, thrown, or been refused something by its policy."""
    visits: list[Visit] = []
    with contextlib.ExitStack() as stack:

        def make(url: str, **options) -> Visit:
            context = stack.enter_context(browser.new_context(**options))
            made = Visit(context.new_page(), url)
            made.page.on("request", lambda request: made.requests.append(request))
            made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
            made.page.on("console", lambda message: made.complaints.append(message.text))
            visits.append(made)
            return made

        yield make
        for made in visits:
            hosts = {urlsplit(request.url).netloc for request in made.requests}
            assert hosts == {urlsplit(made.url).netloc}
            # The browser itself notes every answer that is an error; those are looked at where they are expected.
            assert [line for line in made.complaints if "the server responded with a status of" not in line] == []


def complete(url: str, **body) -> dict:
    """The choice of an ordinary request with the settings of `Visit.run`."""
    asked = {"model": "demo", "prompt": PROMPT, "seed": 3, "max_tokens": 20, **body}
    answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def guided(visit: Visit) -> dict:
    """The choice that a visit's last guided request got, asked for again without a stream."""
    body = {name: value for name, value in visit.bodies()[-1].items() if name not in ("stream", "stream_options")}
    assert any(body["vas_weights"].values())
    return complete(visit.url, **body)


# -- running -------------------------------------------------------------------------------------------------


def test_page_is_served_whole_and_strict(url: str, visit) -> None:
    here = visit(url).open()
    assert here.page.title() == "Playground · vas_engine"
    assert here.page.locator("#model").inner_text() == "demo, 256 tokens of context"
    assert here.page.locator(".slider label").all_inner_texts() == list(STDS)
    paths = {urlsplit(request.url).path for request in here.requests}
    assert {"/", "/style.css", "/main.js", "/v1/models"} <= paths
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "script-src" not in policy
    refused = "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
    assert here.page.evaluate(refused) == "TypeError"
    here.complaints.clear()


def test_two_texts_stream_side_by_side(url: str, visit) -> None:
    here = visit(url).open()
    here.page.evaluate("""() => {
        window.sizes = {plain: [], guided: []};
        for (const name of ["plain", "guided"]) {
            const list = document.querySelector(`#${name} .tokens`);
            const note = () => window.sizes[name].push(list.childElementCount);
            new MutationObserver(note).observe(list, {childList: true});
        }
    }""")
    here.run()
    sizes = here.page.evaluate("window.sizes")
    assert all(len(set(sizes[name])) > 3 for name in ("plain", "guided"))
    assert here.text("plain") == complete(url)["text"]
    assert here.text("guided") == guided(here)["text"] != here.text("plain")
    assert {body["seed"] for body in here.bodies()} == {3}
    assert here.page.locator("#plain .prompt").inner_text() == PROMPT
    boxes = [here.page.locator(f"#{name}").bounding_box() for name in ("plain", "guided")]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]


def test_slider_changes_the_guided_text_alone(url: str, visit) -> None:
    here = visit(url).open()
    here.run()
    plain, before = here.text("plain"), here.text("guided")
    slider = here.page.get_by_role("slider", name="warm")
    slider.focus()
    slider.press("Home")
    here.wait("done", 2)
    # A slider goes from -16 to 16 nats per standard deviation of the reward.
    sent = [body["vas_weights"] for body in here.bodies()]
    assert sent == [
        dict.fromkeys(STDS, 0),
        {"warm": 4 / STDS["warm"], "size": 0},
        {"warm": -16 / STDS["warm"], "size": 0},
    ]
    assert here.page.get_by_label("Weight of warm").input_value() == "-32"
    assert slider.get_attribute("aria-valuetext") == "weight −32, −16.0 nats per standard deviation (0.5)"
    assert here.text("plain") == plain
    assert here.text("guided") == guided(here)["text"] != before
    # With all weights at 0 both texts are the same.
    here.page.get_by_label("Weight of warm").fill("0")
    here.page.keyboard.press("Tab")
    here.wait("done", 3)
    assert here.text("guided") == plain
    assert here.page.locator(".fork").count() == 0


def test_slider_after_another_change_runs_both(url: str, visit) -> None:
    here = visit(url).open()
    here.run()
    here.page.fill("#seed", "4")
    here.page.get_by_role("slider", name="size").press("ArrowRight")
    here.wait("done", 2)
    assert [body["seed"] for body in here.bodies()] == [3, 3, 4, 4]
    assert here.text("plain") == complete(url, seed=4)["text"]


def test_one_seed_repeats(url: str, visit) -> None:
    here = visit(url).open()
    texts = []
    for run, seed in enumerate((3, 3, 4), start=1):
        here.run(run, seed=seed)
        texts.append((here.text("plain"), here.text("guided")))
    assert texts[0] == texts[1] != texts[2]
    here.page.get_by_label("Another seed").click()
    assert int(here.page.input_value("#seed")) != 4


def test_escape_stops(url: str, visit) -> None:
    here = visit(url).open()
    # On the first token, from within the page: a key of Playwright's could come after the last.
    here.page.evaluate("""() => new MutationObserver((_, observer) => {
        observer.disconnect();
        document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape", bubbles: true}));
    }).observe(document.querySelector("#guided .tokens"), {childList: true})""")
    here.run(state="stopped", prompt="Once", **{"max-tokens": 240})
    tokens = here.page.locator("#guided [role=option]").count()
    assert 0 < tokens < 240
    assert here.page.locator("#stop").is_disabled()
    assert not here.page.locator("#error").is_visible()
    running = 'vllm:num_requests_running{model_name="demo"}'
    while f"{running} 0.0" not in (text := httpx.get(f"{url}/metrics").text):
        assert running in text
    here.run(2)
    assert here.text("plain") == complete(url)["text"]


def test_chosen_example_is_the_prompt(url: str, visit) -> None:
    here = visit(url).open()
    here.page.get_by_role("button", name="The old king").click()
    here.page.get_by_role("button", name="Generate").click()
    here.wait("done", 1)
    assert {body["prompt"] for body in here.bodies()} == {"The old king"}


def test_without_values_there_is_plain_text(visit) -> None:
    bare = LLM(tiny_llama(), device="cpu", kv_cache_memory="4MiB", tokenizer=byte_tokenizer())
    with serving(bare) as running:
        here = visit(running.url).open()
        here.run(prompt="Once", **{"max-tokens": 8})
        assert len(here.bodies()) == 1
        assert here.page.locator("#plain [role=option]").count() == 8
        assert here.page.get_by_text("No value is loaded").is_visible()
        for hidden in ("#guided", "#key-to-colours", "#share", "#plots figure"):
            assert not here.page.locator(hidden).first.is_visible()


def test_a_model_behind_an_api(visit) -> None:
    with upstream() as behind, proxying(behind, model_name="demo") as front:
        here = visit(front.url).open()
        assert here.page.locator(".slider label").all_inner_texts() == ["kind"]
        here.run(prompt="Once", **{"max-tokens": 8})
        told = guided(here)
        assert here.page.locator("#guided [role=option]").count() == len(told["vas"]["token_ids"]) > 1
        assert here.text("guided") == told["text"] != here.text("plain")
        here.page.locator("#guided [role=option]").first.focus()
        rows = here.page.locator("#candidates tbody tr")
        assert rows.count() == len(told["vas"]["candidates"][0])
        # V of a token of the tail is known a step later, too late for a stream: the line has a gap there.
        path = here.page.locator("#plots path.guided").get_attribute("d")
        assert 2 < path.count("M") + path.count("L") <= 1 + len(told["vas"]["token_ids"])
        assert front.llm.spent.requests > 16


# -- what is seen --------------------------------------------------------------------------------------------


def test_candidates_by_pointer_and_by_keyboard(url: str, visit) -> None:
    here = visit(url).open()
    here.run()
    expected = guided(here)["vas"]["candidates"]
    panel = here.page.locator("#candidates")

    def check(position: int) -> None:
        rows = panel.locator("tbody tr")
        ranked = sorted(expected[position], key=lambda candidate: -candidate["tilted_logprob"])
        assert rows.count() == len(ranked)
        for i, candidate in enumerate(ranked):
            cells = rows.nth(i).locator("th, td").all_inner_texts()
            assert cells[0] == candidate["token"].replace(" ", "·")
            base, *values, tilted = (float(cell.replace("−", "-").replace("<", "")) for cell in cells[1:])
            assert base == pytest.approx(math.exp(candidate["logprob"]), abs=1.1e-3)
            assert tilted == pytest.approx(math.exp(candidate["tilted_logprob"]), abs=1.1e-3)
            assert values == pytest.approx([candidate["values"][name] for name in STDS], abs=0.06)
        assert panel.locator("tr.drawn").count() == 1
        drawn = panel.locator("tr.drawn th").inner_text()
        assert drawn == expected[position][0]["token"].replace(" ", "·")

    assert panel.is_hidden()
    here.page.locator("#guided [role=option] .ink").nth(4).hover()
    check(4)
    here.page.locator("h1").hover()
    assert panel.is_hidden()
    here.page.locator("#guided [role=option]").first.focus()
    check(0)
    here.page.keyboard.press("ArrowRight")
    here.page.keyboard.press("ArrowRight")
    check(2)
    here.page.keyboard.press("Escape")
    assert panel.is_hidden()


def test_colours_are_advantages(url: str, visit) -> None:
    here = visit(url).open()
    here.run()
    told = guided(here)["vas"]
    here.page.get_by_role("radio", name="size").check()
    before = [told["prompt_values"]["size"], *told["values"]["size"]]
    advantages = [after - v for v, after in itertools.pairwise(before)]
    read = "spans => spans.map(span => Number(span.dataset.shade))"
    shades = here.page.locator("#guided [role=option]").evaluate_all(read)
    scale = float(here.page.locator("#highest").inner_text())
    expected = [max(-4.0, min(4.0, 4 * advantage / scale)) for advantage in advantages]
    assert shades == pytest.approx(expected, abs=0.51)
    assert min(shades) < 0 < max(shades)
    mean = sum(advantages) / len(advantages)
    figures = here.page.locator("#guided .summary").inner_text().replace("−", "-")
    shown = re.search(r"(\S+) mean advantage in size", figures)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(mean, abs=0.051)
    assert f"{len(advantages)} tokens" in figures
    assert f"{told['kl']:.2f} nats of KL spent" in figures
    assert "value evaluations" in figures


def test_plots_show_values_along_the_text(url: str, visit) -> None:
    here = visit(url).open()
    here.run()
    told = guided(here)["vas"]
    assert here.page.locator("#plots figcaption").count() == len(STDS)
    for place, name in enumerate(STDS):
        plot = here.page.locator("#plots figure").nth(place)
        path = plot.locator("path.guided").get_attribute("d")
        heights = [float(point.split(" ")[1]) for point in path[1:].split("L")]
        series = [told["prompt_values"][name], *told["values"][name]]
        assert len(heights) == len(series)
        # Higher values are further up: the drawn heights are the values but for sign and scale.
        drawn, meant = torch.tensor([heights, series])
        assert torch.corrcoef(torch.stack([-drawn, meant]))[0, 1] > 0.999
        steps = here.page.locator("#plain [role=option]").count()
        assert plot.locator("path.plain").get_attribute("d").count("L") == steps
    plot = here.page.locator("#plots figure").first
    box = plot.locator("svg").bounding_box()
    plot.locator("svg").hover(position={"x": box["width"] / 2, "y": 60})
    readout = plot.locator(".readout").inner_text()
    position = int(readout.split(":")[0].removeprefix("token ")) - 1
    token = told["candidates"][position][0]["token"].replace(" ", "·")
    assert f"guided “{token}” {told['values']['warm'][position]:.3f}".replace("-", "−") in readout
    assert plot.locator("circle").count() == 2
    assert here.page.locator("#guided .here").count() == 1


def test_markup_stays_text(url: str, visit) -> None:
    attack = "<img src=x onerror=\"document.title='run'\"><b>hi</b><script>document.title='run'</script>"
    here = visit(url).open()
    here.run(prompt=attack, **{"max-tokens": 5})
    here.page.locator("#share summary").click()
    here.page.fill("#profile-name", attack)
    here.page.locator("#guided [role=option]").first.focus()
    assert here.page.locator("#guided .prompt").inner_text() == attack
    assert yaml.safe_load(here.page.locator("#yaml").inner_text())["profiles"].keys() == {attack}
    assert here.page.locator("img, main script, #columns b:not(.summary b)").count() == 0
    assert here.page.title() == "Playground · vas_engine"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read_on(url: str, visit, scheme: str) -> None:
    here = visit(url, color_scheme=scheme).open()
    read = "it => it.map(one => getComputedStyle(one).backgroundColor)"
    grounds = here.page.locator("#swatches [data-shade]").evaluate_all(read)
    ink, paper = here.page.evaluate("(it => [it.color, it.backgroundColor])(getComputedStyle(document.body))")
    soft = here.page.locator("#plain .prompt").evaluate("it => getComputedStyle(it).color")
    assert len(set(grounds)) == len(grounds) == 9
    assert all(contrast(ground, ink) >= 4.5 for ground in grounds if ground != "rgba(0, 0, 0, 0)")
    assert contrast(paper, ink) > contrast(paper, soft) >= 4.5


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours as CSS writes them."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_phone_needs_no_sideways_scrolling(url: str, visit) -> None:
    here = visit(url, viewport={"width": 380, "height": 800}, has_touch=True, is_mobile=True).open()
    assert here.overflow() == 0
    here.run()
    here.page.locator("#share summary").click()
    here.page.fill("#profile-name", "a-setting-for-quiet-evenings-by-the-harbour")
    here.page.locator("#access summary").click()
    assert here.overflow() == 0
    here.page.locator("#access summary").click()
    boxes = [here.page.locator(f"#{name}").bounding_box() for name in ("controls", "plain", "guided", "plots")]
    assert all(one["y"] + one["height"] <= other["y"] for one, other in itertools.pairwise(boxes))
    assert all(box["width"] <= 380 for box in boxes)
    here.page.locator("#guided [role=option] .ink").nth(4).tap()
    assert here.page.locator("#candidates").is_visible()
    assert here.overflow() == 0


def test_controls_have_names_and_rings(url: str, visit) -> None:
    here = visit(url).open()
    nameless = """controls => controls.filter(it => !it.labels?.length && !it.ariaLabel && !it.textContent.trim())
        .map(it => it.outerHTML)"""
    assert here.page.locator("input, textarea, select, button").evaluate_all(nameless) == []
    reached = set()
    while "generate" not in reached:
        here.page.keyboard.press("Tab")
        name, ring = here.page.evaluate(
            "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert ring == "solid"
        reached.add(name)
    assert {"prompt", "chat", "slider-0", "slider-1", "temperature", "max-tokens", "seed", "new-seed"} < reached


# -- errors, keys, sharing -----------------------------------------------------------------------------------


def test_refusals_are_shown(url: str, visit) -> None:
    here = visit(url).open()
    here.run(prompt="", state="failed")
    alert = here.page.get_by_role("alert")
    assert alert.inner_text().startswith("400: prompt")
    here.run(2)
    assert alert.is_hidden()


def test_keys(visit) -> None:
    """The browser itself asks for the key of the page, which goes along until another is typed into it."""
    with serving(api_keys=("first", "second")) as locked:
        assert httpx.get(locked.url).status_code == 401
        here = visit(locked.url, http_credentials={"username": "any", "password": "first"}).open()
        alert, key = here.page.get_by_role("alert"), here.page.get_by_label("API key of this server")
        here.page.locator("#access summary").click()
        key.fill("guess")
        key.press("Enter")
        alert.filter(has_text="401: wrong API key").wait_for()
        assert here.page.evaluate("document.activeElement.id") == "key"
        key.fill("second")
        key.press("Enter")
        here.wait("ready")
        assert alert.is_hidden()
        here.page.locator("#chat").check()
        here.run(prompt="Hi", **{"max-tokens": 8})
        assert here.bodies()[-1]["messages"] == [{"role": "user", "content": "Hi"}]
        assert here.page.locator("#guided [role=option]").count() == 8
        sent = {request.header_value("authorization") for request in here.requests if request.method == "POST"}
        assert sent == {"Bearer second"}
        read = "[localStorage.length, document.cookie, location.href, JSON.stringify(sessionStorage)]"
        stored, cookie, address, session = here.page.evaluate(read)
        assert (stored, cookie) == (0, "")
        assert "second" not in address
        assert "second" in session


def test_setting_is_shared_by_link_and_yaml(url: str, visit) -> None:
    here = visit(url, permissions=["clipboard-read", "clipboard-write"]).open()
    here.page.get_by_label("Weight of size").fill("-0.25")
    here.run(prompt='A day & a "night"\n?', seed=11, temperature=0.75)
    weights = here.bodies()[-1]["vas_weights"]
    here.page.locator("#share summary").click()
    here.page.fill("#profile-name", "no")
    here.page.get_by_role("button", name="Copy YAML").click()
    here.page.get_by_text("Copied.").wait_for()
    copied = here.page.evaluate("navigator.clipboard.readText()")
    assert yaml.safe_load(copied) == {"profiles": {"no": {"weights": weights}}}
    here.page.get_by_role("button", name="Copy link").click()
    here.page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('http')")
    link = here.page.evaluate("navigator.clipboard.readText()")
    assert link == here.page.url
    other = visit(url).open("#" + link.partition("#")[2])
    other.page.keyboard.press("Control+Enter")
    other.wait("done", 1)
    assert other.bodies() == here.bodies()
    assert other.text("guided") == here.text("guided")


def test_profile_is_saved_with_the_admin_key(url: str, visit) -> None:
    here = visit(url).open()
    here.page.get_by_label("Weight of size").fill("-0.5")
    here.page.locator("#share summary").click()
    here.page.fill("#profile-name", "terse")
    said = here.page.locator("#shared")
    here.page.fill("#admin-key", "guess")
    here.page.keyboard.press("Enter")
    said.filter(has_text="Not saved. 401:").wait_for()
    here.page.fill("#admin-key", ADMIN_KEY)
    here.page.keyboard.press("Enter")
    said.filter(has_text="Saved as “terse”").wait_for()
    assert here.page.input_value("#admin-key") == ""
    saved = httpx.get(f"{url}/v1/profiles").json()["profiles"]["terse"]["weights"]
    assert saved["size"] == -0.5
    other = visit(url).open()
    other.page.get_by_label("Weight of size").fill("3")
    other.page.locator("#profile").select_option("terse")
    assert other.page.get_by_label("Weight of size").input_value() == "-0.5"
