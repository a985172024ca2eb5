"""The files around the code: compose stack, pins, make targets."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())


def test_services_listen_on_loopback_only():
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_secrets_come_from_the_environment():
    secret = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|_URI$|CONNECTION_URL$")
    for service in COMPOSE["services"].values():
        for name, value in service.get("environment", {}).items():
            if (secret.search(name) and "postgres" in value) or "KEY" in name or "PASSWORD" in name:
                assert re.search(r"\$\{[A-Z0-9_]+:\?", value), f"{name} holds a value of its own"
    given = (ROOT / "docker" / "env.example").read_text()
    for name in re.findall(r"\$\{([A-Z0-9_]+):\?", (ROOT / "docker" / "compose.yaml").read_text()):
        assert f"{name}=\n" in given


def test_every_direct_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(pinned) == len(pins), "a package is pinned twice"
    extras = [line for name, extra in project["optional-dependencies"].items() for line in extra]
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} excludes the pin {version}"


@pytest.mark.parametrize("place", ["Makefile", "docker/Dockerfile"])
def test_torch_is_installed_by_the_version_that_is_pinned(place):
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert set(re.findall(r"\btorch==([\d.]+)", (ROOT / place).read_text())) == {pinned}


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    helped = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[1] for line in helped.splitlines()] == targets


def test_make_says_that_python_is_too_old(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["make", "--always-make", "lint", f"PYTHON={tmp_path / 'python'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout


def test_prefect_finds_its_home_in_a_fresh_clone(tmp_path):
    # Prefect makes its home folder, but not the folders above it.
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text() + "\nhome:\n\t@echo $(PREFECT_HOME)\n")
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_HOME"}
    home = subprocess.run(
        ["make", "--no-print-directory", "home"], cwd=tmp_path, env=environment, capture_output=True, text=True
    ).stdout
    assert Path(home.strip()).parent == tmp_path
