"""Options are written once: the command line, Python and the checks read the same fields."""

from __future__ import annotations

import ast
import functools
import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_type_hints

import click
import pytest

import lminf_export
from lminf_export import ConfigError, EngineOptions, ExportOptions, QuantizeConfig
from lminf_export.bundle.records import LambdaSettings, Quantization
from lminf_export.cli.export import export_command
from lminf_export.cli.main import cli
from lminf_export.engine import tensorrt, tensorrt_rtx
from lminf_export.engine.options import BUILDERS
from lminf_export.export.options import CHOICES
from lminf_export.operator.settings import KV_CACHE_DTYPES, KvCacheDtype
from lminf_export.quantize.config import CHOICES as QUANTIZE_CHOICES
from lminf_export.runtime.options import PROVIDERS

PACKAGE = Path(lminf_export.__file__).parent
PARAMETERS = {parameter.name: parameter for parameter in export_command.params}
EXPORT = {field.name: field.default for field in fields(ExportOptions)}
QUANTIZE = {field.name: field.default for field in fields(QuantizeConfig)}
ENGINE = {field.name: field.default for field in fields(EngineOptions)}


def text(values):
    return tuple(str(value) for value in values)


def test_every_field_is_an_option_of_the_command_and_the_reverse():
    of_the_command = {"sample_text", "dry_run", "as_json", "version", "verbose", "quiet"}
    folded_in = {"engine_options"}  # its own fields are options
    wanted = {*EXPORT, *QUANTIZE, *ENGINE} - folded_in
    assert {*PARAMETERS} - of_the_command == wanted


@pytest.mark.parametrize("name", sorted({*EXPORT} - {"engine_options", "quantize", "lora"}))
def test_the_command_has_the_fields_defaults(name):
    default, found = EXPORT[name], PARAMETERS[name].default
    if default is MISSING:
        assert PARAMETERS[name].required
    else:
        assert found == default or (default in (None, False) and not isinstance(found, str | int))


@pytest.mark.parametrize("name", CHOICES)
def test_the_command_has_the_choices_that_are_checked(name):
    assert tuple(PARAMETERS[name].type.choices) == text(CHOICES[name])


@pytest.mark.parametrize("name", sorted({*QUANTIZE} - {"weights", "symmetric"}))
def test_the_command_has_the_choices_and_defaults_of_quantisation(name):
    assert tuple(PARAMETERS[name].type.choices) == text(QUANTIZE_CHOICES[name])
    if QUANTIZE[name] is not None:
        assert PARAMETERS[name].default == str(QUANTIZE[name])


@pytest.mark.parametrize("name", sorted({*CHOICES} - {"builder", "quantize"}))
def test_export_refuses_another_value_with_the_choices(name, tmp_path):
    refuse = functools.partial(lminf_export.export, "model", tmp_path / "b")
    with pytest.raises(ConfigError, match=f"{name}='odd': must be one of {CHOICES[name][0]}"):
        refuse(**{name: "odd"})


def test_all_commands_take_the_providers_of_the_runtime():
    commands = [cli.get_command(click.Context(cli), name) for name in cli.list_commands(None)]
    seen = [
        parameter.type.choices
        for command in commands
        for parameter in command.params
        if parameter.name == "provider"
    ]
    assert len(seen) >= 3
    assert {tuple(choices) for choices in seen} == {PROVIDERS}


def test_the_manifest_knows_the_same_values():
    """Static types cannot be made of tuples, so they are written and compared."""
    assert get_args(KvCacheDtype) == KV_CACHE_DTYPES[1:]
    lambda_hints, quantize_hints = get_type_hints(LambdaSettings), get_type_hints(Quantization)
    assert get_args(lambda_hints["lambda_layers"]) == CHOICES["lambda_layers"]
    for name in ("lm_head", "embeddings"):
        assert get_args(quantize_hints[name]) == QUANTIZE_CHOICES[name]


def test_builders_have_their_names_from_the_options():
    assert (tensorrt.NAME, tensorrt_rtx.NAME) == BUILDERS


def test_export_has_every_field_in_its_signature_and_takes_no_other():
    parameters = inspect.signature(lminf_export.export).parameters
    assert {*parameters} == {*EXPORT, "progress"}
    for name, default in EXPORT.items():
        found = parameters[name].default
        assert found == (inspect.Parameter.empty if default is MISSING else default)
    with pytest.raises(TypeError, match=r"export\(\) got an unexpected keyword argument 'windw'"):
        lminf_export.export("model", "out", windw=3)


LISTS = {*CHOICES.values(), *QUANTIZE_CHOICES.values(), PROVIDERS}
# Modules that define the choices; records has them as static types (compared above).
HOMES = {
    "operator/settings.py",
    "export/options.py",
    "quantize/config.py",
    "engine/options.py",
    "runtime/options.py",
    "bundle/records.py",
    "tensors/dtypes.py",
}


def literals(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            values = [getattr(element, "value", None) for element in node.elts]
            if len(values) > 1 and all(isinstance(value, str) for value in values):
                yield tuple(values)


def test_no_other_module_lists_the_choices_of_an_option():
    found = [
        (name, values)
        for path in PACKAGE.rglob("*.py")
        if (name := path.relative_to(PACKAGE).as_posix()) not in HOMES
        for values in literals(path)
        if values in LISTS
    ]
    assert not found
