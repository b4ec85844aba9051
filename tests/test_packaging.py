"""What is installed, what it needs, and which package may import which."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVER_PACKAGES = (
    "transformers", "fastapi", "starlette", "uvicorn", "uvloop", "httptools", "pydantic_settings",
)  # fmt: skip

# Ahead of the code under test: makes the server's packages impossible to import.
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {SERVER_PACKAGES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
COMMAND = "from eagle3_client.cli import main; main()"


def without_server_packages(
    code: str, *arguments: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a wheel built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys, hatchling.build as b; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)
    (path,) = folder.iterdir()
    return zipfile.ZipFile(path).namelist()


def test_a_wheel_holds_the_three_packages_and_nothing_else_at_the_top(wheel: list[str]) -> None:
    """A top-level `client` or `server` would overwrite others' in a trainer's environment."""
    tops = {name.split("/")[0] for name in wheel}
    metadata = {top for top in tops if top.endswith(".dist-info")}
    assert len(metadata) == 1
    assert tops - metadata == {"eagle3_schemas", "eagle3_client", "eagle3_server"}


@pytest.mark.parametrize("home", ["proto_schemas", "client", "server"])
def test_a_wheel_holds_every_module_the_typing_marker_and_the_page(
    wheel: list[str], home: str
) -> None:
    source = ROOT / home
    modules = {path.relative_to(source).as_posix() for path in source.rglob("*.py")}
    package = modules.copy().pop().split("/")[0]
    others = {"page.html", "py.typed"} if home == "server" else {"py.typed"}
    assert modules | {f"{package}/{name}" for name in others} == {
        name for name in wheel if name.startswith(f"{package}/")
    }


def test_a_wheel_names_the_command_and_the_licence(wheel: list[str]) -> None:
    assert any(name.endswith("entry_points.txt") for name in wheel)
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_client_imports_without_the_servers_packages(tmp_path: Path) -> None:
    code = """
import eagle3_client, eagle3_schemas
assert eagle3_client.RemoteEagle3Backend("http://a:1").num_remote_servers == 2
try:
    import eagle3_server
except ModuleNotFoundError:
    print("blocked as meant")
"""
    done = without_server_packages(code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "blocked as meant\n"), done.stderr


def test_help_needs_no_server_packages(tmp_path: Path) -> None:
    done = without_server_packages(COMMAND, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "serve" in done.stdout


def test_serve_without_the_servers_packages_says_what_to_install(tmp_path: Path) -> None:
    done = without_server_packages(COMMAND, "serve", "x", cwd=tmp_path)
    assert done.returncode != 0
    assert 'pip install "eagle3-remote[server]"' in done.stderr
    assert "Traceback" not in done.stderr


# --- direction of imports ---


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Top-level packages a module imports."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add((node.module or "").partition(".")[0])
    return found


def modules(home: str) -> list[Path]:
    found = sorted((ROOT / home).rglob("*.py"))
    assert len(found) > 5
    return found


def test_the_contract_imports_neither_side() -> None:
    for path in modules("proto_schemas"):
        assert not imported(path) & {"eagle3_client", "eagle3_server"}, path


def test_the_server_never_imports_the_client() -> None:
    for path in modules("server"):
        assert "eagle3_client" not in imported(path), path


def test_the_client_imports_the_server_only_inside_the_command() -> None:
    for path in modules("client"):
        if path.name == "cli.py":
            assert "eagle3_server" not in imported(path, top_level_only=True), path
        else:
            assert "eagle3_server" not in imported(path), path


def test_the_base_packages_import_only_what_the_base_install_declares() -> None:
    declared = {"torch", "httpx", "msgpack", "pydantic", "typer", "eagle3_schemas", "eagle3_client"}
    for home in ("proto_schemas", "client"):
        for path in modules(home):
            foreign = imported(path, top_level_only=True) - set(sys.stdlib_module_names)
            assert foreign <= declared, path
