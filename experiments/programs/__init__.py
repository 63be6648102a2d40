"""What the worked programs of docs/programs need besides the library, and their measurements."""
