from pathlib import Path

from setuptools import find_packages, setup

TEST = [
    "beartype>=0.23",
    "accelerate>=1.15",
    "chex>=0.1.91",
    "diffusers>=0.42",
    "gguf>=0.17",
    "grain>=0.2.18",
    "griffelib>=2.0",
    "mypy>=2.0",
    "peft>=0.21",
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    # torch==2.13.0 is the release whose CPU build the tests were written with; install it in a pip call of its own.
    "torch==2.13.0",
]

setup(
    name="sysdpo_jax",
    version="0.1.0",
    description="System-level direct preference optimisation of compound AI systems in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    license_files=["LICENSE"],
    packages=find_packages(include=["sysdpo_jax", "sysdpo_jax.*"]),
    package_data={
        "sysdpo_jax": ["py.typed"],
        "sysdpo_jax.annotation": ["*.jinja", "*.css", "*.js"],
        "sysdpo_jax.pretrained": ["*.yaml"],
        "sysdpo_jax.recipes": ["*.yaml", "*.csv", "*.txt", "*.jsonl"],
        "sysdpo_jax.report": ["*.jinja", "*.css"],
    },
    entry_points={"console_scripts": ["sysdpo=sysdpo_jax.cli.main:main"]},
    install_requires=[
        "datasets>=4.0",
        "docstring-parser>=0.16",
        "filelock>=3.24",
        "flax>=0.12",
        "httpx>=0.28",
        "huggingface_hub>=1.0",
        "jax>=0.10",
        "jaxtyping>=0.3.7",
        "jinja2>=3.1",
        "jsonargparse>=4.53",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11.0",
        "pyarrow>=21.0",
        "pyyaml>=6.0",
        "rich>=14.0",
        "safetensors>=0.6",
        "scipy>=1.13",
        "shtab>=1.7",
        "tenacity>=9.0",
        "tensorboardX>=2.6",
        "tokenizers>=0.22",
        "transformers>=5.0",
    ],
    extras_require={
        "test": TEST,
        # Builds the documentation.
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
        # Reads GGUF files.
        "gguf": ["gguf>=0.17"],
        # Sends a run's metrics to Weights & Biases.
        "wandb": ["wandb>=0.20"],
        "tpu": ["jax[tpu]>=0.10"],
        # Compiles for TPUs on a machine without any.
        "tpu-aot": ["libtpu>=0.0.52"],
        "cuda": ["jax[cuda12]>=0.10"],
    },
)
