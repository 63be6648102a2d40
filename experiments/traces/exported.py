"""Write SmolLM2-135M-Instruct as a folder that vLLM serves.

example:
  python -m experiments.traces.exported smollm2
"""

import sys
from pathlib import Path

import sysdpo_jax as sj
from experiments.common.models import smollm2_file


def main(folder: Path) -> None:
    """Load the GGUF file, and save it."""
    component, params = sj.pretrained.load(str(smollm2_file()))
    sj.pretrained.save(folder, component, params)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
