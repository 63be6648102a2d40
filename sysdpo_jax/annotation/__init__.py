"""What people prefer: whole runs side by side on a local page, or as tasks of other tools, and back."""
