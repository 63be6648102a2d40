"""Decoding of text, noise schedules and samplers: functions of a model and its parameters."""
