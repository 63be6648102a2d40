"""Two language models in sequence: one writes a draft, the other the answer; preferences see the answer alone."""
