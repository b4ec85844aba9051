"""Take the pictures of `docs/images/`: the page of a real server that a real trainer trains on.

Serves SmolLM2-135M with a token, runs `examples/train_eagle3.py` against it twice, with two draft
vocabs, and looks at the page with a headless Chromium; a few minutes on two cores:

    python tools/set_up.py demo page && .venv/bin/python tools/page_screenshots.py

Needs Chromium: `apt-get install --no-install-recommends chromium fonts-dejavu-core`.
"""

from __future__ import annotations

import argparse
import io
import os
import secrets
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TEXT = "The capital of France is Paris,\nand Weißwürste are eaten before noon."
DESKTOP = {"viewport": {"width": 1200, "height": 800}}
PHONE = {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 1.5}
WAIT_MS = 300_000


def started(stack: ExitStack, command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a process that ends with the stack."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        stderr=subprocess.PIPE if "serve" in command else None,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def serve(stack: ExitStack, checkpoint: Path, token: str) -> str:
    """Serve the target; return its URL when it is ready."""
    command = ["-m", "eagle3_client.cli", "serve", str(checkpoint), "--port", "0"]
    server = started(stack, command, EAGLE3_TOKEN=token, OMP_NUM_THREADS="1")
    assert server.stderr is not None
    for line in server.stderr:
        if "trainers use" in line:
            drain = threading.Thread(target=server.stderr.read, daemon=True)  # or the pipe fills
            drain.start()
            return line.split()[-1]
    raise SystemExit("the server ended before it was ready")


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(EXAMPLES))  # which import one another by name
    from smollm2 import smollm2_checkpoint

    checkpoint, token = smollm2_checkpoint(), secrets.token_hex(16)
    with ExitStack() as stack:
        url = serve(stack, checkpoint, token)
        texts = [str(path) for path in sorted(Path(os.__file__).parent.glob("[a-c]*.py"))[:12]]
        for size in ("8192", "4096"):
            command = [str(EXAMPLES / "train_eagle3.py"), "--urls", url, "--text", *texts]
            command += [
                "--tokenizer",
                str(checkpoint),
                "--steps",
                "400",
                "--draft-vocab-size",
                size,
            ]
            command += ["--batch-size", "2", "--sequence-length", "128"]
            started(
                stack, command, EAGLE3_TOKEN=token, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore"
            )
        # Something for the list of errors: a frame that is none.
        headers = {"authorization": f"Bearer {token}", "content-type": "text/plain"}
        httpx.post(f"{url}/v1/supervision", headers=headers, content=b"x")
        chromium = stack.enter_context(sync_playwright()).chromium
        browser = chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        stack.callback(browser.close)

        def keep(page: Any, name: str) -> None:
            """Save what is in sight, in 256 colours: half the bytes, and nobody sees it."""
            image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            path = arguments.out / f"{name}.png"
            image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(path, path.stat().st_size, "bytes", flush=True)

        def look(**options: Any) -> Any:
            page = browser.new_context(**options).new_page()
            page.set_default_timeout(WAIT_MS)
            page.goto(url)
            page.locator("#token").fill(token)
            page.keyboard.press("Enter")
            page.locator("#trainers tbody tr:nth-child(2)").wait_for()
            page.locator("#counted:text-matches('^[2-9][0-9]$|...')").wait_for()  # under way
            page.locator("#window:text-matches('last (29|3.) s')").wait_for()
            return page

        for name, options in {
            "page-light": DESKTOP,
            "page-dark": {**DESKTOP, "color_scheme": "dark"},
            "page-phone": PHONE,
        }.items():
            keep(look(**options), name)
        page = look(**DESKTOP)
        page.locator("#text").fill(TEXT)
        page.locator("#top").fill("3")
        page.locator("#go").click()
        page.locator("#answer").wait_for()
        page.locator("section[aria-labelledby=h-probe]").evaluate("(node) => node.scrollIntoView()")
        keep(page, "page-probe")


if __name__ == "__main__":
    main()
