"""The exact verification: enumerable systems, population losses on them, and two solvers."""
