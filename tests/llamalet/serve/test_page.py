"""The page: its files as they are, its routes, and what people can do with it in a headless Chromium."""

import http.client
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from llamalet.model_options import DEMO_MODEL
from llamalet.runtime import Model
from llamalet.sampler import SamplingConfig
from llamalet.serve import insight

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("uvicorn", reason="the server's packages are not installed")

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in insight.PAGE.iterdir() if path.is_file())
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
KEY = "a-key-of-the-tests"
LINK = "#t=0.8&k=0&p=0.9&m=0&s=7&n=40&text=Once+upon+a+time"


# --- the files ---


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_has_nothing_inline_and_nothing_from_elsewhere(path):
    text = path.read_text()
    for address in re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\s\"'`]*", text):
        assert address.startswith("http://www.w3.org/"), address  # names of namespaces, which nobody fetches
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    assert not re.search(r"DOMParser|createContextualFragment|setHTML|srcdoc", text)
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text, re.IGNORECASE)
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text))
    if path.suffix == ".js":
        assert not re.search(r"setAttribute\(\s*[\"'](style|on)|localStorage\.setItem\(KEY", text)
        assert all(name.startswith("./") for name in re.findall(r"from \"([^\"]+)\"", text))


def test_every_file_is_served_and_every_name_is_a_file():
    assert set(insight.page_files()) == {path.name for path in FILES}
    index = (insight.PAGE / "index.html").read_text()
    named = set(re.findall(r"\"/page/([^\"]+)\"", index))
    scripts = {path.name for path in FILES if path.suffix == ".js"}
    assert named == {path.name for path in FILES} - {"index.html"} and scripts <= named
    ids = re.findall(r"\sid=\"([^\"]+)\"", index)
    assert len(ids) == len(set(ids))
    for path in FILES:
        if path.suffix == ".js":
            assert set(re.findall(r"\$\(\"([^\"]+)\"\)", path.read_text())) <= set(ids), path.name


def test_only_one_region_speaks_and_one_alerts():
    index = (insight.PAGE / "index.html").read_text()
    assert re.findall(r"role=\"(status|alert|log)\"", index) == ["alert", "status"]
    assert "aria-live" not in "".join(path.read_text() for path in FILES)


# --- the routes ---


@contextmanager
def running(*options: str, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Run the server on a free port, without compiled kernels; yield its address."""
    command = [sys.executable, "-m", "llamalet.serve", str(DEMO_MODEL), "--port=0", "--backend=numpy", *options]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = []
            for line in server.stderr:
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            else:
                raise AssertionError("".join(lines))
            _wait_for_health(found[0])
            yield found[0]
        finally:
            server.terminate()
            server.communicate(timeout=20)


def _wait_for_health(address: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if ask(address, "GET", "/health")[0] == 200:
            return
        time.sleep(0.05)
    raise AssertionError("the server did not get ready")


def ask(address: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, data, headers | ({} if data is None else {"content-type": "application/json"}))
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    connection.close()
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running("--no-log") as address:
        yield address


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model.load(DEMO_MODEL, backend="numpy")


def test_the_page_comes_with_a_policy_that_lets_nothing_else_in(server):
    status, headers, body = ask(server, "GET", "/")
    assert status == 200 and body == (insight.PAGE / "index.html").read_bytes()
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["content-type"] == "text/html; charset=utf-8" and headers["x-content-type-options"] == "nosniff"
    for path in FILES:
        status, headers, body = ask(server, "GET", f"/page/{path.name}")
        assert status == 200 and body == path.read_bytes()
    assert ask(server, "GET", "/page/main.js")[1]["content-type"] == "text/javascript; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "../serve/insight.py",
        "..%2finsight.py",
        "%2e%2e/insight.py",
        "..",
        "%00",
        "main.js%00",
        "a/b",
        "nothing",
        "%C3%A9",
    ],
)
def test_no_other_file_is_served(server, path):
    assert ask(server, "GET", f"/page/{path}")[0] in (400, 404)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("distribution", b"[]", "object"),
        ("distribution", b"{", "JSON"),
        ("distribution", {}, "tokens"),
        ("distribution", {"tokens": []}, "at least one"),
        ("distribution", {"tokens": [2048]}, "2048"),
        ("distribution", {"tokens": ["1"]}, "tokens"),
        ("distribution", {"tokens": [1], "temperature": -1}, "temperature"),
        ("distribution", {"tokens": [1], "n": 10**6}, "n=1000000"),
        ("distribution", {"tokens": [1], "step": 10**9}, "step"),
        ("distribution", {"tokens": [1], "colour": 1}, "colour"),
        ("distribution", {"tokens": [1] * 400}, "400"),
        ("attention", {"tokens": []}, "at least one"),
        ("attention", {"tokens": [1] * 400}, "400"),
        ("truth", {"tokens": [-1]}, "tokens"),
        ("truth", {"tokens": [5000]}, "5000"),
        ("truth", {"tokens": [1] * 400}, "400"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(server, path, body, message):
    status, _, answer = ask(server, "POST", f"/page/{path}", body)
    error = json.loads(answer)["error"]
    assert status == 400 and message in error["message"] and "\n" not in error["message"], error


def test_looks_answer_for_the_model_that_is_served(server, demo):
    tokens = demo.tokenizer.encode("Once upon a time there was a", bos=True)
    status, _, body = ask(server, "POST", "/page/distribution", {"tokens": tokens, "top_k": 3, "seed": 5, "step": 4})
    found = json.loads(body)
    config = SamplingConfig(top_k=3, top_p=1.0, seed=5)
    logits = demo.logits(tokens)[-1]
    expected = insight.distribution(logits, config, 4, choose=demo.transformer.choose, undrawn=demo.undrawn)
    assert status == 200 and found["token"] == expected["token"] and found["coin"] == expected["coin"]
    assert [row["raw"] for row in found["rows"]] == pytest.approx([row["raw"] for row in expected["rows"]], rel=1e-2)
    layers = json.loads(ask(server, "POST", "/page/attention", {"tokens": tokens})[2])["layers"]
    assert (len(layers), len(layers[0]), len(layers[0][0])) == (3, 4, len(tokens))
    truth = json.loads(ask(server, "POST", "/page/truth", {"tokens": tokens})[2])
    assert truth["n_possible"] > 40
    facts = json.loads(ask(server, "GET", "/page/model")[2])
    assert facts["speaks_grammar"] and not facts["is_chat"] and facts["name"] == "demo"


def test_returned_ids_come_with_ranks_and_entropies(server, demo):
    tokens = demo.tokenizer.encode("Once upon a time there was", bos=True)
    asked = {"prompt": tokens, "max_tokens": 0, "echo": True, "logprobs": 2, "return_token_ids": True}
    found = json.loads(ask(server, "POST", "/v1/completions", asked)[2])["choices"][0]["logprobs"]
    logits = demo.logits(tokens)[:-1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ranks = [int((row > row[token]).sum()) for row, token in zip(logprobs, tokens[1:], strict=True)]
    assert found["ranks"] == [None, *ranks]
    assert found["entropies"][0] is None
    assert found["entropies"][1:] == pytest.approx(list(-(np.exp(logprobs) * logprobs).sum(axis=1)), rel=0.1, abs=1e-3)
    del asked["return_token_ids"]
    plain = json.loads(ask(server, "POST", "/v1/completions", asked)[2])["choices"][0]["logprobs"]
    assert plain.keys() == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """A page in a browser window of its own, and what went wrong in it."""

    def __init__(self, browser: Any, address: str, *, link: str = LINK, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": 1440, "height": 1000}, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address + link)

    def until(self, check: Callable[[], object]) -> None:
        """Wait for something; the page's policy allows no functions that are sent as text."""
        end = time.monotonic() + 20
        while not check():
            assert time.monotonic() < end, "waited in vain"
            self.page.wait_for_timeout(20)

    def until_written(self) -> None:
        self.until(lambda: self.page.get_attribute("#pad", "aria-busy") == "false" and self.tokens())

    def tokens(self) -> list[str]:
        return self.page.locator("#pad .token:not(.next)").all_text_contents()

    def text(self) -> str:
        return self.page.locator("#pad").text_content()

    def number(self, name: str) -> str:
        return self.page.locator(f"#numbers div:has(dt:text-is('{name}')) dd").inner_text()

    def violations(self) -> list[str]:
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
        found = axe.Axe().run(self.page)
        return [f"{item['id']}: {node['html']}" for item in found.response["violations"] for node in item["nodes"]]


@pytest.fixture
def visit(browser, server) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def open_(address: str = server, **options: Any) -> Visit:
        visits.append(Visit(browser, address, **options))
        return visits[-1]

    yield open_
    for made in visits:
        assert made.complaints == []
        assert {urlsplit(url).hostname for url in made.requests} == {"127.0.0.1"}
        made.context.close()


@pytest.mark.slow
def test_a_link_tells_the_story_of_its_seed(visit, demo):
    seen = visit()
    seen.until_written()
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "max_new_tokens": 40}
    assert seen.text() == "Once upon a time" + "".join(demo.generate("Once upon a time", **options))
    assert len(seen.tokens()) == 44
    assert seen.page.inner_text("#status") == "40 tokens were written."


@pytest.mark.slow
def test_every_state_passes_axe_on_wide_and_narrow_screens(visit):
    for width, options in [(1440, {}), (360, {"color_scheme": "dark"}), (1440, {"forced_colors": "active"})]:
        seen = visit(**options)
        page = seen.page
        page.set_viewport_size({"width": width, "height": 800})
        seen.until_written()
        seen.until(lambda page=page: page.locator("#table tbody tr").count())
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.click("#show-paths")
        page.wait_for_selector("#paths li")
        page.locator("#pad .token").nth(9).click()
        assert page.is_visible("#alternatives")
        page.locator("#look").click()
        page.locator(".head").first.click()
        page.locator("#pad .token").nth(9).click()
        assert seen.violations() == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.keyboard.press("Escape")
    page.click("#edit")
    assert seen.violations() == []


@pytest.mark.slow
def test_the_keyboard_goes_through_the_story_and_branches_it(visit):
    seen = visit()
    seen.until_written()
    page, before = seen.page, seen.tokens()
    focused = lambda: page.evaluate("document.activeElement.textContent")  # noqa: E731
    page.locator("#pad .token").nth(6).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused() == before[8] and page.is_visible("#alternatives")
    assert page.locator("#alternatives button").count() == 10
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "BUTTON"
    page.keyboard.press("Escape")
    assert focused() == before[8] and page.is_hidden("#alternatives")
    page.keyboard.press("Home")
    assert focused() == before[0]
    page.keyboard.press("ArrowDown")
    assert focused() != before[0]
    page.locator("#pad .token").nth(8).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    chosen = page.locator("#alternatives button .piece").nth(1).inner_text().strip("\u00b7")
    page.keyboard.press("Enter")
    seen.until(lambda: len(seen.tokens()) > 40)
    seen.until_written()
    after = seen.tokens()
    assert after[:8] == before[:8] and after[8] == chosen != before[8] and focused() == chosen
    page.keyboard.press("Control+z")  # what was written
    page.keyboard.press("Control+z")  # the choice
    assert seen.tokens() == before
    page.keyboard.press("Control+Shift+z")
    page.keyboard.press("Control+Shift+z")
    assert seen.tokens() == after


@pytest.mark.slow
def test_drawing_one_by_one_gives_what_writing_gives(visit):
    seen = visit(link=LINK.replace("n=40", "n=12"))
    seen.until_written()
    whole = seen.tokens()
    for _ in range(3):
        n = len(seen.tokens())
        seen.page.click("#rewind")
        seen.until(lambda n=n: len(seen.tokens()) == n - 1)
    for n in range(len(whole) - 3, len(whole)):
        seen.page.click("#step")
        seen.until(lambda n=n: len(seen.tokens()) == n + 1)
    assert seen.tokens() == whole
    # Each token shows the coin that drew it, and that it falls on the token.
    for place in (len(whole) - 1, 7, 4):
        seen.page.locator("#pad .token").nth(place).click()
        coin = f"Seed 7, coin {place - 3}: "
        seen.until(lambda coin=coin: seen.page.inner_text("#coin").startswith(coin))
        assert seen.page.locator("#coin .piece").inner_text().strip("\u00b7") == whole[place]


@pytest.mark.slow
def test_a_pasted_text_is_scored_and_never_run(visit, demo):
    seen = visit(link=LINK.replace("n=40", "n=1"))
    seen.until_written()
    text = "Once upon a time <img src=x onerror=alert(1)> there was a \u00e9 girl.\n<script>alert(2)</script>"
    seen.page.click("#edit")
    seen.page.fill("#editor", text)
    seen.page.click("#edit")
    seen.until(lambda: seen.text() == text)
    seen.until_written()
    seen.until(lambda: seen.number("tokens") == str(len(demo.tokenizer.encode(text))))
    assert seen.page.locator("#pad img, #pad script").count() == 0
    ids = demo.tokenizer.encode(text, bos=True)
    nats = demo.transformer.losses(demo.logits(ids[:-1]), np.array(ids[1:])).sum()
    bits = nats / 0.6931471805599453 / len(text.encode())
    assert float(seen.number("bits per byte")) == pytest.approx(bits, rel=0.02)


@pytest.mark.slow
def test_escape_stops_the_story(visit):
    seen = visit(link="#t=1&p=1&s=3&n=300&text=Once+upon+a+time")
    seen.until(lambda: len(seen.tokens()) > 8)
    seen.page.keyboard.press("Escape")
    seen.until_written()
    assert 8 < len(seen.tokens()) < 200
    assert seen.page.inner_text("#write") == "Write on"
    assert "stop" in seen.page.inner_text("#status").lower() or "written" in seen.page.inner_text("#status")


def edit(seen: Visit, text: str) -> None:
    seen.page.click("#edit")
    seen.page.fill("#editor", text)
    seen.page.click("#edit")


@pytest.mark.slow
def test_a_path_is_not_taken_into_a_text_that_streams_and_goes_when_the_story_changes(visit):
    seen = visit(link=LINK.replace("n=40", "n=12"))
    seen.until_written()
    page, before = seen.page, seen.tokens()
    page.locator("#pad .token").nth(6).click()
    page.keyboard.press("Escape")
    page.click("#show-paths")
    page.wait_for_selector("#paths li")
    page.fill("#length", "200")
    page.evaluate("document.getElementById('write').click(); document.querySelector('#paths button')?.click()")
    seen.until(lambda: len(seen.tokens()) > len(before) + 8)
    page.keyboard.press("Escape")
    seen.until_written()
    assert seen.tokens()[: len(before)] == before
    assert page.locator("#paths li").count() == 0
    page.click("#show-paths")
    page.wait_for_selector("#paths li")
    edit(seen, "The cat sat.")
    seen.until(lambda: seen.text() == "The cat sat.")
    assert page.locator("#paths li").count() == 0


@pytest.mark.slow
def test_nothing_else_changes_the_story_while_its_text_is_edited(visit):
    seen = visit(link=LINK.replace("n=40", "n=300"))
    seen.until(lambda: len(seen.tokens()) > 8)
    page = seen.page
    page.click("#edit")
    for name in ("write", "again", "undo", "redo", "step", "rewind", "show-paths"):
        seen.until(lambda name=name: page.is_disabled(f"#{name}"))
    page.locator("#theme").focus()
    page.keyboard.press("Control+z")
    page.fill("#editor", "The cat sat.")
    page.click("#edit")
    seen.until(lambda: seen.text() == "The cat sat.")
    # A text that is written while an edited one is read is stopped.
    held: list[Any] = []
    page.route("**/tokenize", lambda route: held.append(route))
    edit(seen, "The dog ran.")
    seen.until(lambda: held)
    page.click("#write")
    seen.until(lambda: len(seen.tokens()) > 8)
    held[0].continue_()
    seen.until(lambda: seen.text() == "The dog ran.")
    seen.until_written()
    assert seen.text() == "The dog ran."


@pytest.mark.slow
def test_undo_brings_back_the_seed_and_the_address(visit):
    seen = visit(link=LINK.replace("n=40", "n=12"))
    seen.until_written()
    page = seen.page
    state = lambda: (seen.tokens(), page.input_value("#seed"), page.evaluate("location.hash"))  # noqa: E731
    first = state()
    page.click("#write")
    seen.until(lambda: len(seen.tokens()) > len(first[0]))
    seen.until_written()
    second = state()
    assert first[1] == "7" and second[1] == "8" and first[2] != second[2]
    page.click("#undo")
    assert state() == first
    page.click("#redo")
    assert state() == second


@pytest.mark.slow
def test_a_request_that_is_refused_leaves_no_trace(visit):
    seen = visit(link=LINK.replace("n=40", "n=12"))
    seen.until_written()
    page = seen.page
    state = lambda: (seen.tokens(), page.input_value("#seed"), page.evaluate("location.hash"))  # noqa: E731
    before = state()
    page.route("**/v1/completions", lambda route: route.fulfill(status=503, json={"error": {"message": "busy"}}))
    page.click("#write")
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#problem") == "busy" and state() == before
    page.click("#undo")
    assert page.is_disabled("#undo")
    seen.complaints.clear()


@pytest.mark.slow
def test_tokens_that_come_at_once_have_no_rate(visit):
    seen = visit(link=LINK.replace("n=40", "n=1"))
    seen.until_written()
    seen.page.fill("#length", "12")
    seen.page.route("**/v1/completions", lambda route: route.fulfill(response=route.fetch()))
    seen.page.click("#write")
    seen.until(lambda: len(seen.tokens()) > 10)
    seen.until_written()
    assert "tokens/s" not in seen.page.inner_text("#numbers")


@pytest.mark.slow
def test_answers_for_another_story_are_dropped(visit):
    seen = visit(link=LINK.replace("n=40", "n=12"))
    seen.until_written()
    page = seen.page
    held: list[Any] = []
    page.route("**/page/attention", lambda route: held.append(route))
    page.click("#look")
    seen.until(lambda: held)
    page.click("#rewind")
    held[0].continue_()
    seen.until(lambda: page.get_attribute("#heads", "aria-busy") == "false")
    assert page.locator(".head").count() == 0
    # Nor can a token be taken from a table that is still of the old place.
    seen.until(lambda: page.locator("#table tbody tr").count())
    page.route("**/page/distribution", lambda route: None)
    page.click("#rewind")
    before = seen.tokens()
    page.locator("#table tbody button").first.click()
    assert seen.tokens() == before


@pytest.mark.slow
def test_bits_per_byte_are_of_the_tokens_that_are_known(visit):
    seen = visit(link=LINK.replace("n=40", "n=1"))
    seen.until_written()
    held: list[Any] = []
    seen.page.route("**/v1/completions", lambda route: held.append(route))
    edit(seen, "Once upon a time there was a")
    seen.until(lambda: held)
    seen.page.keyboard.press("Escape")
    seen.until_written()
    seen.page.click("#step")
    seen.until(lambda: len(seen.text()) > len("Once upon a time there was a"))
    n_bytes = len(seen.text()) - len("Once upon a time there was a")
    per_token, per_byte = float(seen.number("bits per token")), float(seen.number("bits per byte"))
    assert per_byte == pytest.approx(per_token / n_bytes, abs=0.006)


@pytest.mark.slow
def test_of_a_text_beyond_the_context_its_beginning_is_scored(visit, demo):
    seen = visit(link=LINK.replace("n=40", "n=1"))
    seen.until_written()
    text = "Once upon a time there was a brave girl named Maya. She liked the sun. " * 28
    ids = demo.tokenizer.encode(text, bos=True)
    context = demo.config.max_seq_len
    assert len(ids) > context
    edit(seen, text)
    seen.until(lambda: "the context holds" in seen.page.inner_text("#numbers"))
    seen.until(lambda: "bits per byte" in seen.page.inner_text("#numbers"))
    held = f"{len(ids) - 1}, of which the context holds the first {context - 1}"
    assert seen.number("tokens") == held and f"first {context - 1} tokens" in seen.page.inner_text("#status")
    nats = demo.transformer.losses(demo.logits(ids[: context - 1]), np.array(ids[1:context])).sum()
    n_bytes = sum(len(demo.tokenizer.token_bytes(id)) for id in ids[1:context]) - 1  # without the space that is added
    assert float(seen.number("bits per byte")) == pytest.approx(nats / np.log(2) / n_bytes, rel=0.02)
    # Of what follows the text the server says why there is nothing.
    seen.until(lambda: "context" in seen.page.inner_text("#table-note"))
    assert seen.page.inner_text("#choices-help") == "" and "token" not in seen.page.locator(".count").first.inner_text()
    seen.complaints.clear()


@pytest.mark.slow
def test_a_link_holds_an_empty_text_and_is_followed_in_an_open_page(visit, server):
    seen = visit(link=LINK.replace("n=40", "n=4"))
    seen.until_written()
    page = seen.page
    edit(seen, "")
    seen.until(lambda: page.evaluate("location.hash").endswith("&text="))
    page.reload()
    seen.until_written()
    page.locator("#pad .token").first.click()
    seen.until(lambda: page.inner_text("#coin").startswith("Seed 7, coin 1: "))
    page.keyboard.press("Escape")
    address = page.evaluate("location.href")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main" and page.evaluate("location.href") == address
    page.goto(server + "#s=9&n=4&text=The+cat")
    seen.until(lambda: page.input_value("#seed") == "9")
    seen.until_written()
    assert seen.text().startswith("The cat")


@pytest.mark.slow
def test_a_choice_in_a_text_that_streams_is_written_on(visit):
    seen = visit(link="#t=1&p=1&s=3&n=250&text=Once+upon+a+time")
    seen.until(lambda: len(seen.tokens()) > 8)
    page = seen.page
    page.locator("#pad .token").nth(6).click()
    n = len(seen.tokens())
    seen.until(lambda: len(seen.tokens()) > n + 3)
    assert page.is_visible("#alternatives") and page.get_attribute("#pad", "aria-busy") == "true"
    chosen = page.locator("#alternatives button:not(.here) .piece").first.inner_text().strip("\u00b7")
    page.locator("#alternatives button:not(.here)").first.click()
    seen.until(lambda: seen.tokens()[6] == chosen and len(seen.tokens()) > 12)
    assert page.is_hidden("#alternatives")
    page.keyboard.press("Escape")
    seen.until_written()


@pytest.mark.slow
def test_sliders_act_at_once_and_stay_in_the_address(visit):
    seen = visit()
    seen.until_written()
    seen.until(lambda: "tokens" in seen.page.inner_text("#sliders"))
    seen.page.locator("#slider-top_k").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.until(lambda: "1 token" in seen.page.locator("#sliders li").nth(1).inner_text())
    assert "k=1&" in seen.page.evaluate("location.hash")
    seen.until(lambda: "top-k" in seen.page.inner_text("#table"))


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(visit, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with running("--no-log", f"--api-key-file={keys}") as address:
        seen = visit(address)
        page = seen.page
        page.wait_for_selector("#key-dialog[open]")
        assert seen.violations() == []
        assert page.is_hidden("#key-problem")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        seen.until(lambda: page.is_visible("#key-problem") and "does not know" in page.inner_text("#key-problem"))
        assert page.input_value("#key") == "" and seen.violations() == []
        page.fill("#key", "schl\u00fcssel\u20ac")
        page.keyboard.press("Enter")
        seen.until(lambda: "ASCII" in page.inner_text("#key-problem"))
        assert page.evaluate("Object.values(sessionStorage)") == ["wrong"]
        page.keyboard.press("Escape")
        seen.until(lambda: "Reload" in page.inner_text("#problem"))
        page.reload()
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        seen.until_written()
        assert page.input_value("#key") == ""
        assert page.evaluate("Object.values(sessionStorage)") == [KEY]
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        # The browser reports the answers 401, and nothing else.
        assert all("401" in complaint for complaint in seen.complaints)
        seen.complaints.clear()


@pytest.mark.slow
def test_a_chat_is_sent_edited_and_made_again(visit):
    with running("--no-log", "--chat-template=llama2") as address:
        seen = visit(address, link="")
        page = seen.page
        page.wait_for_selector("#ask:visible")
        seen.until_written()
        n_tokens = len(seen.tokens())
        page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=503, json={"error": {"message": "busy"}})
        )
        page.fill("#ask", "Tell me about <b>whales</b>")
        page.keyboard.press("Control+Enter")
        seen.until(lambda: page.is_visible("#problem"))
        assert page.inner_text("#problem") == "busy" and page.locator("#messages li").count() == 0
        assert page.input_value("#ask") == "Tell me about <b>whales</b>" and len(seen.tokens()) == n_tokens
        seen.complaints.clear()
        page.unroute("**/v1/chat/completions")
        page.focus("#ask")
        page.keyboard.press("Enter")
        busy = lambda: page.get_attribute("#messages", "aria-busy") == "true"  # noqa: E731
        seen.until(lambda: page.locator("#messages .assistant .content").inner_text() and not busy())
        assert "tokens/s" in page.inner_text("#messages") and page.locator("#messages b").count() == 0
        assert seen.violations() == []
        first = page.inner_text("#messages .assistant .content")
        page.click("#messages .assistant button")
        seen.until(lambda: not busy() and page.inner_text("#messages .assistant .content") not in ("", first))
        assert page.locator("#messages li").count() == 2
        page.click("#messages .user button")
        assert page.input_value("#ask") == "Tell me about <b>whales</b>" and page.locator("#messages li").count() == 0
