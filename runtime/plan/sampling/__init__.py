"""Samplers as tables: noise levels (levels.py, schedules.py), moves between them (samplers.py), steps (sample.py)."""
