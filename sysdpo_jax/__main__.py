"""`python -m sysdpo_jax` is `sysdpo`."""

from sysdpo_jax.cli.main import main

if __name__ == "__main__":
    main()
