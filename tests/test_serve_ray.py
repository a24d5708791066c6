"""Ray Serve: arguments are checked before anything runs, and a real fleet loses no turn."""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import yaml

from lminf_export.errors import ConfigError, InputError
from lminf_export.serve.ray_arguments import ArgumentError, Arguments
from tests.support.tiny_bundle import TinyModel

ROOT = Path(__file__).resolve().parents[1]
SECRET = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("ray") / "tiny"
    TinyModel().write(path)
    return path


def test_arguments_of_a_command_line_are_texts(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    arguments = Arguments.of(
        {
            "bundle": "demo", "replicas": "2", "slots": "4", "prefix_reuse": "false",
            "max_stream_seconds": "12.5", "session_store": "s3://bucket",
            "session_secret_file": str(secret), "allow_hosts": "box.lan, box",
            "allow_origins": "https://app.example",
        }
    )  # fmt: skip
    assert arguments.replicas == 2
    settings = arguments.settings()
    assert (settings.slots, settings.prefix_reuse, settings.max_stream_seconds) == (4, False, 12.5)
    assert settings.session_secrets == (SECRET,)
    assert settings.allow_hosts == ("box.lan", "box")
    assert settings.allow_origins == ("https://app.example",)
    # No secret is in what Ray keeps and shows.
    assert SECRET not in repr(arguments)


def test_values_of_a_file_have_their_types():
    arguments = Arguments.of(
        {"bundle": "demo", "replicas": 2, "num_cpus": 0.5, "slots": 4, "allow_hosts": ["box"]}
    )
    assert (arguments.replicas, arguments.num_cpus) == (2, 0.5)
    assert arguments.settings().allow_hosts == ("box",)


WRONG = [
    ({"slots": 0}, "slots=0: must be"),
    ({"slots": "many"}, "slots: Input should be a valid integer"),
    ({"slot": 4}, "'slot' is no setting"),
    ({"api_keys": ("k",)}, "name a file by api_key_file"),
    ({"session_secrets": ("k",)}, "name a file by session_secret_file"),
    ({"session_folder": "f"}, "replicas share a session_store"),
    ({"session_secret_file": "f"}, "goes with a session_store"),
    ({"replicas": 3, "max_replicas": 2}, "must be at least replicas=3"),
    ({"replicas": 0}, "replicas: Input should be greater"),
    ({"replicas": 10**20}, "replicas: Input should be less"),
    ({"num_cpus": "nan"}, "num_cpus: Input should be a finite"),
    ({"num_cpus": "inf"}, "num_cpus: Input should be a finite"),
    ({"num_gpus": float("inf")}, "num_gpus: Input should be a finite"),
    ({"drain_seconds": "inf"}, "drain_seconds: Input should be a finite"),
    ({"max_queued": 0}, "max_queued: Input should be greater"),
    ({"provider": "tpu"}, "provider='tpu': must be one of"),
    ({"name": "\n"}, "is no model name"),
    ({"allow_hosts": "a,,b"}, "allow_hosts"),
    ({"session_store": "s3://KEY:TOPSECRET@bucket"}, "session_store: keys in a URL"),
    ({"session_store": "https://TOPSECRET@host/x"}, "session_store: keys in a URL"),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_arguments_that_no_server_takes_are_refused(given, words):
    with pytest.raises(ArgumentError, match=words) as caught:
        Arguments.of({"bundle": "demo", **given})
    assert "\n" not in str(caught.value)
    assert "TOPSECRET" not in str(caught.value)


def test_all_that_is_wrong_is_named_at_once_and_no_value_of_a_secret():
    given = {"replicas": "0", "api_keys": "TOPSECRET", "num_cpus": "nan"}
    with pytest.raises(ArgumentError) as caught:
        Arguments.of(given)
    text = str(caught.value)
    for name in ("bundle: ", "replicas: ", "num_cpus: ", "api_keys "):
        assert name in text
    assert "TOPSECRET" not in text


@pytest.mark.parametrize("scheme", ["az", "abfs", "abfss"])
def test_an_azure_container_is_no_key(scheme):
    url = f"{scheme}://container@account.dfs.core.windows.net/p"
    assert Arguments.of({"bundle": "demo", "session_store": url}).session_store == url
    with pytest.raises(ArgumentError, match="keys in a URL"):
        Arguments.of({"bundle": "demo", "session_store": f"{scheme}://name:key@account/p"})


def test_a_short_secret_is_refused_before_anything_is_deployed(tiny, tmp_path):
    short = tmp_path / "short"
    short.write_text("too short\n")
    given = {"bundle": str(tiny), "session_store": "s", "session_secret_file": str(short)}
    with pytest.raises(ArgumentError, match="secret 1 has 9 characters"):
        Arguments.of(given).found_here()


def test_a_folder_may_have_an_at_sign():
    assert Arguments.of({"bundle": "demo", "session_store": "/mnt/a:b@c"}).session_store


def test_an_argument_error_is_one_of_ours_and_of_clicks(capsys):
    """Ray's command line, which click runs, then prints one line and exits with 2."""
    error = pickle.loads(pickle.dumps(ArgumentError("slots: must be more")))
    assert isinstance(error, ConfigError)
    assert isinstance(error, click.ClickException)
    error.show()
    assert capsys.readouterr().err == "error: slots: must be more\n"
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bundle": "/nonexistent"}, "/nonexistent does not exist"),
        ({"api_key_file": "/nonexistent"}, "cannot read /nonexistent"),
        ({"template": "/nonexistent"}, "/nonexistent"),
        (
            {"session_store": "/tmp/store", "session_secret_file": "/nonexistent"},
            "cannot read /nonexistent",
        ),
    ],
)
def test_files_are_looked_at_where_the_application_is_made(tiny, given, words):
    with pytest.raises(ArgumentError, match=words):
        Arguments.of({"bundle": str(tiny), **given}).found_here()


def test_paths_are_absolute_where_replicas_run(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny.parent)
    Path("keys").write_text("key\n")
    given = {"bundle": "tiny", "api_key_file": "keys", "session_store": "store"}
    found = Arguments.of(given).found_here()
    assert found.bundle == str(tiny)
    assert found.api_key_file == str(tiny.parent / "keys")
    assert found.session_store == str(tiny.parent / "store")
    kept = Arguments.of({"bundle": "org/name", "session_store": "s3://bucket"}).found_here()
    assert (kept.bundle, kept.session_store) == ("org/name", "s3://bucket")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["replicas=2"], "bundle: "),
        (["bundle=BUNDLE", "slot=4", "replicas=0", "num_cpus=inf"], "replicas: "),
        (["bundle=BUNDLE", "num_cpus=0.00001"], "num_cpus"),
        (["bundle=/nonexistent"], "/nonexistent does not exist"),
    ],
)
def test_a_wrong_argument_costs_one_line_of_rays_command(tiny, given, words):
    pytest.importorskip("ray")
    given = [text.replace("BUNDLE", str(tiny)) for text in given]
    found = subprocess.run(
        [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking",
         "lminf_export.serve.ray:app", *given],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    [line] = [line for line in found.stderr.splitlines() if "INFO" not in line]
    assert line.startswith("error: ")
    assert words in line


def test_a_store_needs_its_secret_where_a_replica_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("LMINF_SESSION_SECRET", raising=False)
    arguments = Arguments.of({"bundle": "demo", "session_store": str(tmp_path)})
    with pytest.raises(InputError, match="needs a secret"):
        arguments.settings()
    monkeypatch.setenv("LMINF_SESSION_SECRET", SECRET)
    assert arguments.settings().session_secrets == (SECRET,)


def test_the_application_scales_by_its_queue(tiny):
    pytest.importorskip("ray")
    from lminf_export.serve.ray import app

    given = {"bundle": str(tiny), "replicas": 1, "max_replicas": 4, "slots": 6}
    deployment = app(given)._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.target_ongoing_requests == 6
    router = deployment._deployment_config.request_router_config.get_request_router_class()
    assert router.__name__ == "ConsistentHashRouter"
    fixed = app(Arguments.of({"bundle": str(tiny), "replicas": 3}))._bound_deployment
    assert fixed.num_replicas == 3


@pytest.mark.parametrize("given", [{}, {"max_requests": 5}, {"slots": 9, "max_waiting": 3000}])
def test_a_replica_gets_more_than_it_takes_and_refuses_the_rest_itself(tiny, given):
    pytest.importorskip("ray")
    from lminf_export.serve.ray import app

    made = app({"bundle": str(tiny), **given})._bound_deployment
    settings = Arguments.of({"bundle": str(tiny), **given}).settings()
    assert made.max_ongoing_requests > settings.slots + settings.max_waiting
    assert made.max_ongoing_requests > settings.max_requests
    most = app({"bundle": str(tiny), "max_waiting": 2**40})._bound_deployment
    assert most.max_ongoing_requests == 2**31 - 1


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), (None, False),
     ("0.0.0.0", True), ("::", True), ("192.0.2.7", True), ("", True)],
)  # fmt: skip
def test_without_a_key_the_proxy_must_be_of_this_machine(
    host, is_open, tiny, monkeypatch, tmp_path
):
    pytest.importorskip("ray")
    from lminf_export.serve import ray as application
    from lminf_export.serve import ray_proxy

    client = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr(ray_proxy.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_proxy, "_get_global_client", lambda **_: client)
    monkeypatch.delenv("LMINF_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    given = {"bundle": str(tiny)}
    if is_open:
        with pytest.raises(ArgumentError, match="which needs a key"):
            application.app(given)
        with pytest.raises(ConfigError, match="which needs a key"):
            application.Replica(Arguments.of(given))
        application.app({**given, "api_key_file": str(keys)})
    else:
        application.app(given)


def test_the_configuration_that_is_shown_is_safe_and_one_of_ours():
    pytest.importorskip("ray")
    from ray.serve.schema import ServeDeploySchema

    found = yaml.safe_load((ROOT / "examples" / "ray" / "config.yaml").read_text())
    config = ServeDeploySchema.model_validate(found)
    assert config.http_options.host == "127.0.0.1"
    [application] = config.applications
    assert application.import_path == "lminf_export.serve.ray:app"
    assert Arguments.of(application.args).replicas >= 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray's processes are found by their names")
def test_a_proxy_for_all_machines_is_not_served_without_a_key(tiny, monkeypatch, tmp_path):
    """Ray as it is, whose own functions tell where the proxy listens."""
    pytest.importorskip("ray")
    import httpx

    from benchmarks.scaling.ray_fleet import cluster
    from lminf_export.serve.ray import Replica, app

    monkeypatch.delenv("LMINF_API_KEY", raising=False)
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    with cluster(host="0.0.0.0") as url:
        from ray import serve

        given = {"bundle": str(tiny), "threads": 1}
        with pytest.raises(ArgumentError, match=r"0\.0\.0\.0"):
            app(given)
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
            Replica(Arguments.of(given))
        serve.run(app({**given, "api_key_file": str(keys)}), route_prefix="/", blocking=False)
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401


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
