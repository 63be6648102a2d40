"""What the entry points for a system of your own share."""
