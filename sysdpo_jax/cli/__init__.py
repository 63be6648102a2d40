"""The commands: each a module, with what they share."""
