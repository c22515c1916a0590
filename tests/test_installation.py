"""All processes of a test run use one package: that which is installed, wherever the tests lie."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardemb


def where(_):
    return shardemb.__file__


def test_a_subprocess_imports_the_same_package():
    program = "import shardemb; print(shardemb.__file__, end='')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == shardemb.__file__


@pytest.mark.parametrize("_", ["another process"])
def test_another_process_imports_the_same_package(_, elsewhere):
    assert elsewhere(where) == shardemb.__file__


@pytest.mark.skipif("SHARDEMB_TEST_INSTALLED" not in os.environ, reason="any copy may be tested")
def test_the_installed_package_is_tested():
    """In each of pytest's processes: this one is any of them."""
    assert Path(shardemb.__file__).is_relative_to(sys.prefix)
    assert "site-packages" in Path(shardemb.__file__).parts
