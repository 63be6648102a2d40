"""Diffusion and flow: noise schedules, weightings of timesteps, samplers."""
