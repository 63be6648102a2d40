"""Progressive image sequences at laptop size: a language model writes three captions, a diffusion model draws them."""
