"""Create `.venv` and install the project into it; safe to repeat. Used by the Makefile.

Standard library only. Honours pip's own variables and configuration. A torch that the calling
Python already has is reused, so that nobody downloads a second one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "eagle3-set-up.json"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_TORCH = (2, 6)
# Installed without their requirements, which are those of whole training and serving stacks.
PEERS = ("nemo-automodel", "speculators", "hs-connectors", "specforge")


def own_torch() -> tuple[str, str] | None:
    """Return version and site directory of the calling Python's torch, if it is recent enough."""
    code = (
        "import json, pathlib, torch; "
        "print(json.dumps([torch.__version__, str(pathlib.Path(torch.__file__).parents[1])]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode != 0:
        return None
    version, site = json.loads(found.stdout.splitlines()[-1])
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return (version, site) if numbers >= OLDEST_TORCH else None


def venv_python() -> Path:
    """Return the environment's interpreter."""
    return VENV / ("Scripts" if os.name == "nt" else "bin") / "python"


def pip(*arguments: str) -> None:
    """Run the environment's pip; end with its message if it fails."""
    command = [str(venv_python()), "-m", "pip", "install", "--quiet", *arguments]
    print("  pip install", *arguments, flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def main() -> int:
    """Set up what the named groups need."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", default=["dev"], help="dependency groups")
    groups = sorted(set(parser.parse_args().groups))
    torch = own_torch()
    state = {
        "python": sys.version,
        "torch": torch,
        "files": hashlib.sha256(
            b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
        ).hexdigest(),
    }
    done = json.loads(STAMP.read_text()) if STAMP.exists() else {"groups": []}
    is_current = {name: done.get(name) for name in state} == json.loads(json.dumps(state))
    if is_current and set(groups) <= set(done["groups"]):
        return 0
    groups = sorted({*groups, *(done["groups"] if is_current else [])})

    print(f"Setting up {VENV.name}/ (once) for: {', '.join(groups)}", flush=True)
    if torch is None and not done.get("groups"):
        print(
            "  downloads torch 2.13.0 (190 MB as a CPU build; 3 GB with CUDA, whichever your pip "
            "index serves; a torch that $PYTHON has is used instead)"
        )
    elif torch is not None:
        print(f"  uses the torch {torch[0]} that {sys.executable} has")
    sizes_mb = {"containers": 35, "page": 50, "peer": 85, "quantised": 50, "ray": 80}
    size_mb = 120 + sum(sizes_mb.get(group, 0) for group in groups)
    print(f"  downloads up to {size_mb} MB of other packages, less what pip has cached", flush=True)
    if not venv_python().exists():
        venv.EnvBuilder(with_pip=True, upgrade_deps=False).create(VENV)
    constraints = CONSTRAINTS.read_text().splitlines()
    reuse = Path(
        subprocess.run(
            [venv_python(), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip(),
        "reused-torch.pth",
    )
    if torch is not None and torch[1] != sysconfig.get_path("purelib", vars={"base": str(VENV)}):
        # Its packages come after the environment's own on the path, so pinned versions win.
        reuse.write_text(torch[1] + "\n")
        constraints = [line for line in constraints if not line.startswith("torch==")]
        constraints.append(f"torch=={torch[0]}")
    else:
        reuse.unlink(missing_ok=True)
    effective = VENV / "constraints.txt"
    effective.write_text("\n".join(constraints) + "\n")
    pip("--constraint", str(effective.relative_to(ROOT)), "pip")  # the first to know --group
    pip(
        *("--constraint", str(effective.relative_to(ROOT)), "--editable", ".[server]"),
        *(part for group in groups for part in ("--group", group)),
    )
    if "peer" in groups:
        pip("--constraint", str(effective.relative_to(ROOT)), "--no-deps", *PEERS)
    STAMP.write_text(json.dumps({**state, "groups": groups}))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"set-up failed: {' '.join(map(str, error.cmd))}; see above") from error
