"""Settings of a server: refused where they are nonsense, and heard where they are not."""

from __future__ import annotations

import httpx
import pytest

from lminf_export.errors import ConfigError, InputError
from lminf_export.serve.app import create_app
from lminf_export.serve.settings import ServeSettings
from tests.support import serving
from tests.support.serving import CHAT, COMPLETIONS, post


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_keys": "secret"}, "api_keys"),
        ({"api_keys": (1,)}, "api_keys"),
        ({"api_keys": None}, "api_keys"),
        ({"api_keys": ("abc ",)}, "space"),
        ({"allow_hosts": "box"}, "allow_hosts"),
        ({"allow_hosts": ("box.lan:80",)}, "allow_hosts"),
        ({"allow_hosts": ("http://x/",)}, "allow_hosts"),
        ({"allow_origins": ("evil",)}, "allow_origins"),
        ({"allow_origins": ("http://app.example/",)}, "allow_origins"),
        ({"body_seconds": "a"}, "body_seconds"),
        ({"body_seconds": True}, "body_seconds"),
        ({"body_seconds": 10**400}, "body_seconds"),
        ({"write_seconds": 1j}, "write_seconds"),
        ({"session_folder": 3}, "session_folder"),
        ({"prefix_reuse": "no"}, "prefix_reuse"),
    ],
)
def test_settings_of_another_kind_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        ServeSettings(**settings)
    assert ServeSettings(allow_hosts=("::1", "box.lan"), session_folder="x").allow_hosts


@pytest.mark.parametrize("models", [{}, None, {"a": 1}, [1]])
def test_an_application_needs_models(models):
    with pytest.raises(InputError, match="models"):
        create_app(models, ServeSettings())


def test_a_page_elsewhere_may_send_its_client_s_headers(demo_lm):
    with serving.server_thread(demo_lm, allow_origins=("https://app.example",)) as server:
        found = httpx.options(
            server.url + CHAT,
            headers={
                "origin": "https://app.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type,x-stainless-os",
            },
        )
    assert found.status_code == 200
    assert "x-stainless-os" in found.headers["access-control-allow-headers"]


@pytest.mark.parametrize("n", [1, 4])
def test_every_token_has_its_time_in_the_metrics(demo_lm, n):
    with serving.server_thread(demo_lm) as server:
        post(server.url, COMPLETIONS, prompt="It is", max_tokens=7, n=n, ignore_eos=True)
        text = httpx.get(server.url + "/metrics").text
    [line] = [x for x in text.splitlines() if x.startswith("lminf_inter_token_seconds_count")]
    assert float(line.split()[-1]) == 6 * n
