"""Ray Serve: arguments are checked before anything runs, and a real fleet loses no turn."""

from __future__ import annotations

import argparse
import sys

import pytest

from lminf_export.errors import ConfigError, InputError
from lminf_export.serve.ray_arguments import Arguments

SECRET = "0123456789abcdef" * 4


def test_arguments_of_a_command_line_are_texts(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    arguments = Arguments.model_validate(
        {
            "bundle": "demo", "replicas": "2", "slots": "4", "prefix_reuse": "false",
            "max_stream_seconds": "12.5", "session_store": "s3://bucket",
            "session_secret_file": str(secret),
        }
    )  # fmt: skip
    assert arguments.replicas == 2
    settings = arguments.settings()
    assert (settings.slots, settings.prefix_reuse, settings.max_stream_seconds) == (4, False, 12.5)
    assert settings.session_secrets == (SECRET,)
    # No secret is in what Ray keeps and shows.
    assert SECRET not in repr(arguments)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"slots": 0}, "slots=0: must be"),
        ({"slots": "many"}, "slots: Input should be a valid integer"),
        ({"slot": 4}, "'slot' is no setting"),
        ({"api_keys": ("k",)}, "name a file by api_key_file"),
        ({"session_secrets": ("k",)}, "name a file by session_secret_file"),
        ({"session_folder": "f"}, "replicas share a session_store"),
        ({"session_secret_file": "f"}, "goes with a session_store"),
        ({"replicas": 3, "max_replicas": 2}, "must be at least replicas=3"),
    ],
)
def test_arguments_that_no_server_takes_are_refused(given, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Arguments(bundle="demo", **given).checked()
    assert "\n" not in str(caught.value)


def test_a_store_needs_its_secret_where_a_replica_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("LMINF_SESSION_SECRET", raising=False)
    arguments = Arguments(bundle="demo", session_store=str(tmp_path))
    arguments.checked()
    with pytest.raises(InputError, match="needs a secret"):
        arguments.settings()
    monkeypatch.setenv("LMINF_SESSION_SECRET", SECRET)
    assert arguments.settings().session_secrets == (SECRET,)


def test_the_application_scales_by_its_queue():
    pytest.importorskip("ray")
    from lminf_export.serve.ray import app

    deployment = app(
        Arguments(bundle="demo", replicas=1, max_replicas=4, slots=6)
    )._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.target_ongoing_requests == 6
    router = deployment._deployment_config.request_router_config.get_request_router_class()
    assert router.__name__ == "ConsistentHashRouter"
    fixed = app(Arguments(bundle="demo", replicas=3))._bound_deployment
    assert fixed.num_replicas == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray's processes are found by their names")
def test_a_fleet_loses_no_turn_when_a_replica_is_killed_or_replaced(demo_bundle):
    pytest.importorskip("ray")
    from benchmarks.scaling.ray_fleet import measure

    found = measure(
        argparse.Namespace(bundle=str(demo_bundle), conversations=8, clients=4, tokens=32)
    )
    assert found["openai"]["equal_to_offline"]
    assert found["departure"]["busy_before"] == 1
    assert found["failure"]["replicas"] == 2
    assert found["failure"]["conversations_equal_to_undisturbed"] == 8
    assert found["update"]["requests"] > 4
    assert found["update"]["failed"] == 0
