"""List the packaged configurations, or print one to be edited.

examples:
  sysdpo recipes
  sysdpo recipes quickstart > my_run.yaml

`sysdpo train NAME` runs one as it is. What is printed holds the whole paths of the files that come with it.
"""

from dataclasses import dataclass

from sysdpo_jax.runs.files import recipe_text, recipes

POSITIONAL = "name"


@dataclass(frozen=True)
class Config:
    """Which recipe.

    Args:
        name: Recipe to print; all are listed without it.
    """

    name: str = ""


def run(config: Config) -> None:
    """Print the list, or the recipe. Raises `ConfigError` for a name that is none."""
    if config.name:
        print(recipe_text(config.name), end="")
        return
    for name, path in recipes().items():
        print(f"{name:<18} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
