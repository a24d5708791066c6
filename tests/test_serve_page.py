"""The page of `lminf serve`, in a real headless Chromium, against a real server.

The browser is fetched once, by `make test-versions`; from then on `make test` runs these, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.support import chromium
from tests.support.serving import NAME, offline_answer, offline_text, server_process

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, Page, Response, expect

pytestmark = [pytest.mark.slow]
if chromium.found() is None:
    pytestmark.append(pytest.mark.registry)

KEY = "a-key-for-tests"
QUESTION = "Tell me of Elizabeth."
MARKUP = "<img src=x onerror=\"document.title='run'\"><b>bold</b> &amp; <script>1</script>"
SECONDS = 20_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.browser() as running:
        yield running


@pytest.fixture(scope="module")
def server(demo_bundle) -> Iterator[str]:
    with server_process(demo_bundle, "--slots", "2") as running:
        yield running.url


@pytest.fixture
def context(browser) -> Iterator[BrowserContext]:
    with browser.new_context() as context:
        context.set_default_timeout(SECONDS)
        yield context


class Watched:
    """A page, what it sent, and what its console and its policy complained of."""

    def __init__(self, page: Page, allowed: str = "$^") -> None:
        self.page = page
        self.complaints: list[str] = []
        self.sent: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        page.on("console", lambda message: self._complain(allowed, message.text))
        page.on("pageerror", lambda error: self._complain("$^", str(error)))
        page.on("request", self._keep)
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => "
            "console.error('policy:', event.violatedDirective, event.blockedURI))"
        )

    def _complain(self, allowed: str, text: str) -> None:
        if not re.search(allowed, text):
            self.complaints.append(text)

    def _keep(self, request) -> None:
        if request.method == "POST":
            self.sent.append(request.post_data_json)
            self.headers.append(request.headers)

    def send(self, text: str) -> None:
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def answer(self, place: int) -> str:
        """Return an answer's text once it is complete."""
        expect(self.page.locator("#log li.assistant")).to_have_count(place + 1, timeout=SECONDS)
        expect(self.page.locator("#stop")).to_be_hidden(timeout=SECONDS)
        found = self.page.locator("#log li.assistant").nth(place).text_content()
        assert found is not None
        return found

    def set(self, **fields: object) -> None:
        self.page.locator("#settings").evaluate("element => { element.open = true }")
        for name, value in fields.items():
            self.page.fill(f"#{name}, [name={name}]", str(value))


@pytest.fixture
def watched(context, server) -> Iterator[Watched]:
    watched = Watched(context.new_page())
    response = watched.page.goto(server)
    assert response is not None
    expect(watched.page.locator("#model option")).to_have_text([NAME], timeout=SECONDS)
    yield watched
    assert watched.complaints == []


def test_an_answer_streams_in_and_is_the_models_own(watched, demo_lm):
    lengths = watched.page.evaluate_handle(
        "() => { const found = []; new MutationObserver(() => found.push("
        "document.querySelector('#log').textContent.length)).observe(document.querySelector("
        "'#log'), {childList: true, characterData: true, subtree: true}); return found; }"
    )
    watched.set(temperature=0, max_tokens=900)
    watched.send(QUESTION)
    asked = [{"role": "user", "content": QUESTION}]
    assert watched.answer(0) == offline_answer(demo_lm, asked, 900)
    grown = lengths.json_value()
    assert len(set(grown)) > 3
    assert grown == sorted(grown)
    expect(watched.page.locator("#note")).to_have_text(re.compile("number of tokens"))
    expect(watched.page.locator("#position")).to_have_text(re.compile(r"^\d\d\d$"))


def test_a_second_turn_sends_only_what_is_new_and_goes_on(watched, server):
    watched.set(temperature=0, max_tokens=24, system="Answer as a letter.")
    watched.send(QUESTION)
    first = watched.answer(0)
    watched.send("And of Jane?")
    second = watched.answer(1)
    assert [body["messages"] for body in watched.sent] == [
        [
            {"role": "system", "content": "Answer as a letter."},
            {"role": "user", "content": QUESTION},
        ],
        [{"role": "user", "content": "And of Jane?"}],
    ]
    assert len({headers["x-session-id"] for headers in watched.headers}) == 1
    whole = httpx.post(
        f"{server}/v1/chat/completions",
        json={
            "messages": [
                *watched.sent[0]["messages"],
                {"role": "assistant", "content": first},
                *watched.sent[1]["messages"],
            ],
            "temperature": 0,
            "max_tokens": 24,
        },
        timeout=60,
    ).json()
    assert second == whole["choices"][0]["message"]["content"]
    total = whole["usage"]["total_tokens"]
    expect(watched.page.locator("#position")).to_have_text(str(total))


def test_what_the_server_has_dropped_is_sent_again(watched, server):
    watched.set(temperature=0, max_tokens=16)
    watched.send(QUESTION)
    first = watched.answer(0)
    session = watched.headers[0]["x-session-id"]
    assert httpx.delete(f"{server}/v1/sessions/{session}").is_success
    watched.send("And of Jane?")
    watched.answer(1)
    assert [message["content"] for message in watched.sent[-1]["messages"]] == [
        QUESTION, first, "And of Jane?",
    ]  # fmt: skip
    assert len(watched.complaints) == 1  # the browser's own line for the refusal
    assert "404" in watched.complaints.pop()


def test_stop_ends_an_answer_and_frees_its_slot(watched, server):
    watched.set(temperature=0, max_tokens=200_000)
    watched.send(QUESTION)
    item = watched.page.locator("#log li.assistant")
    expect(item).to_have_text(re.compile(r"\S{1,}.*\S"), timeout=SECONDS)
    expect(watched.page.locator("#send")).to_be_hidden()
    assert slots_busy(server) == 1
    watched.page.click("#stop")
    written = watched.answer(0)
    watched.page.wait_for_function(
        "async () => /^lminf_slots_busy.* 0\\.0$/m.test(await (await fetch('metrics')).text())"
    )
    assert watched.answer(0) == written
    expect(watched.page.locator("#note")).to_have_text("Stopped.")
    watched.set(max_tokens=8)
    watched.send("Go on.")
    watched.answer(1)
    # The session has not kept what was stopped, so all of it is sent.
    assert [message["content"] for message in watched.sent[-1]["messages"]] == [
        QUESTION, written, "Go on.",
    ]  # fmt: skip


def slots_busy(server: str) -> float:
    found = re.search(r"^lminf_slots_busy\S* (\S+)$", httpx.get(f"{server}/metrics").text, re.M)
    assert found is not None
    return float(found[1])


def test_metrics_follow_the_server(watched):
    page = watched.page
    expect(page.locator("#slots")).to_have_text("0 of 2", timeout=SECONDS)
    expect(page.locator("#queue")).to_have_text("0")
    cache = page.locator("#cache").text_content()
    assert re.fullmatch(r"[\d.]+ [KMG]iB", cache)
    watched.set(max_tokens=200_000)
    watched.send(QUESTION)
    expect(page.locator("#slots")).to_have_text("1 of 2", timeout=SECONDS)
    expect(page.locator("#rate")).to_have_text(re.compile(r"^[1-9]\d*\.\d$"), timeout=SECONDS)
    expect(page.locator("#first")).to_have_text(re.compile(r"^\d+ ms$"), timeout=SECONDS)
    assert page.locator("#cache").text_content() == cache
    page.press("#input", "Escape")
    expect(page.locator("#slots")).to_have_text("0 of 2", timeout=SECONDS)


def test_markup_is_text_wherever_it_comes_from(watched, server):
    """In a question, in what a model writes, in an error, in a model's name."""
    page = watched.page

    def write_markup(route) -> None:
        chunks = [{"delta": {"content": MARKUP}}, {"delta": {}, "finish_reason": "stop"}]
        lines = ["data: " + json.dumps({"choices": [{"index": 0, **chunk}]}) for chunk in chunks]
        body = "\n\n".join([*lines, "data: [DONE]", ""])
        route.fulfill(body=body, headers={"content-type": "text/event-stream"})

    page.route("**/v1/chat/completions", write_markup)
    watched.send(MARKUP)
    assert watched.answer(0) == MARKUP
    assert page.locator("#log li.user").text_content() == MARKUP
    page.unroute("**/v1/chat/completions")
    refused = {"status": 400, "json": {"error": {"message": f"{MARKUP}\nof two lines"}}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**refused))
    watched.send("A second text")
    expect(page.locator("#error")).to_have_text(f"{MARKUP} of two lines")
    expect(page.locator("#input")).to_have_value("A second text")
    expect(page.locator("#log li")).to_have_count(2)
    models = {"data": [{"id": MARKUP, "chat": True}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    watched.set(key="x")
    page.press("#key", "Tab")
    expect(page.locator("#model option")).to_have_text([MARKUP])
    assert page.locator("#log img, #log b, #log script, #error *, option *").count() == 0
    assert page.title() == "lminf"
    assert "400" in watched.complaints.pop()


def test_a_model_without_a_template_goes_on_with_raw_text(watched):
    page = watched.page
    models = {"data": [{"id": NAME, "chat": False}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.reload()
    expect(page.locator("#mode")).to_have_value("text")
    watched.set(max_tokens=4)
    watched.send("It is a truth")
    assert watched.answer(0)
    assert watched.sent[0]["prompt"] == "It is a truth"


def test_what_had_come_stays_when_a_server_ends(context, demo_bundle):
    with server_process(demo_bundle, "--slots", "1", "--shutdown-seconds", "0.2") as running:
        watched = Watched(context.new_page(), allowed="net::|Failed to load|503")
        watched.page.goto(running.url)
        expect(watched.page.locator("#model option")).to_have_text([NAME])
        watched.set(max_tokens=200_000)
        watched.send(QUESTION)
        item = watched.page.locator("#log li.assistant")
        expect(item).to_have_text(re.compile(r"\S"), timeout=SECONDS)
        running.process.terminate()
        expect(watched.page.locator("#error")).to_have_text("the server is shutting down")
        assert watched.answer(0)
        assert watched.complaints == []


def test_raw_text_goes_on_where_it_ends(watched, demo_lm):
    watched.set(temperature=0, max_tokens=12)
    watched.page.select_option("#mode", "text")
    watched.send("It is a truth")
    first = watched.answer(0)
    assert first == offline_text(demo_lm, "It is a truth", 12)
    watched.send(" and then")
    watched.answer(1)
    assert [body["prompt"] for body in watched.sent] == ["It is a truth", " and then"]


def test_a_new_conversation_ends_the_old_session(watched, server):
    watched.set(max_tokens=4)
    watched.send(QUESTION)
    watched.answer(0)
    with watched.page.expect_response("**/v1/sessions/*") as dropped:
        watched.page.click("#new")
    assert dropped.value.ok
    expect(watched.page.locator("#log li")).to_have_count(0)
    watched.send(QUESTION)
    watched.answer(0)
    assert len({headers["x-session-id"] for headers in watched.headers}) == 2


def test_a_conversation_stays_over_a_reload_of_its_tab_only(watched, context, server):
    watched.set(max_tokens=8, temperature=0)
    watched.send(QUESTION)
    first = watched.answer(0)
    watched.page.reload()
    assert watched.answer(0) == first
    assert watched.page.input_value("[name=max_tokens]") == "8"
    watched.send("And of Jane?")
    watched.answer(1)
    assert watched.headers[-1]["x-session-id"] == watched.headers[0]["x-session-id"]
    other = context.new_page()
    other.goto(server)
    expect(other.locator("#model option")).to_have_text([NAME])
    assert other.locator("#log li").count() == 0
    assert other.evaluate("localStorage.length") == 0


def test_a_wrong_key_is_said_in_one_line_and_a_right_one_works(context, demo_bundle):
    with server_process(demo_bundle, "--slots", "1", LMINF_API_KEY=KEY) as running:
        watched = Watched(context.new_page(), allowed="401")
        page = watched.page
        page.goto(running.url)
        expect(page.locator("#error")).to_have_text(re.compile("key"))
        watched.set(key="wrong")
        page.press("#key", "Tab")
        expect(page.locator("#error")).to_have_text(re.compile("wrong"))
        watched.set(key=KEY, max_tokens=4)
        page.press("#key", "Tab")
        expect(page.locator("#model option")).to_have_text([NAME])
        expect(page.locator("#error")).to_be_empty()
        watched.send(QUESTION)
        assert watched.answer(0)
        assert KEY not in page.url
        assert page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
        assert watched.complaints == []


def test_a_lost_connection_is_said_and_the_text_stays(context, demo_bundle):
    with server_process(demo_bundle, "--slots", "1") as running:
        watched = Watched(context.new_page(), allowed="net::|Failed to load")
        watched.page.goto(running.url)
        expect(watched.page.locator("#model option")).to_have_text([NAME])
        running.process.kill()
        running.process.wait()
        watched.send(QUESTION)
        expect(watched.page.locator("#error")).to_have_text(re.compile("cannot be reached"))
        expect(watched.page.locator("#input")).to_have_value(QUESTION)
        assert watched.complaints == []


def test_the_page_asks_nothing_of_other_hosts_and_may_not(context, server):
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    response: Response | None = page.goto(server)
    assert response is not None
    policy = response.header_value("content-security-policy")
    assert policy is not None
    assert "unsafe" not in policy
    assert all(url.startswith(server) for url in asked)
    run = "document.body.append(Object.assign(document.createElement('script'), {text: 'x = 1'}))"
    page.evaluate(run)
    assert page.evaluate("typeof x") == "undefined"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_its_controls_have_names(browser, server, scheme):
    size = {"width": 360, "height": 640}
    with browser.new_context(viewport=size, color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(server)
        expect(page.locator("#model option")).to_have_text([NAME])
        page.click("summary")
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        for control in page.locator("button, input, select, textarea").all():
            name = control.evaluate(
                "e => e.ariaLabel || e.labels?.[0]?.textContent || e.textContent"
            )
            assert name.strip()
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body)"
            ".backgroundColor].map((c) => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
        )
        assert (ink < paper) == (scheme == "light")
        assert abs(ink - paper) > 400
