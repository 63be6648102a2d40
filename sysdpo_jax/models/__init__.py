"""Neural networks as Flax linen modules and their configurations; nothing of ours is imported here."""
