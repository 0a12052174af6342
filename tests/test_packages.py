"""Commands that a message gives to be copied."""

import shlex
import sys

import pytest
from densegrpo.engine.packages import pip_install, quoted


def test_packages_are_installed_into_the_python_that_runs():
    assert shlex.split(pip_install("-U", "rapidocr")) == [sys.executable, "-m", "pip", "install", "-U", "rapidocr"]


@pytest.mark.parametrize("argument", ["plain", "diffusers>=0.35", "a[b]", "<x", "/a folder/file"])
def test_a_shell_reads_an_argument_as_it_is(argument):
    assert shlex.split(quoted(argument)) == [argument]


@pytest.mark.parametrize("argument", ["diffusers>=0.35", r"C:\Program Files\x"])
def test_windows_knows_double_quotes_only(argument):
    assert quoted(argument) == f'"{argument}"'
