"""The command `sysdpo`: its help, its completions, and what it says of words that it does not know."""
