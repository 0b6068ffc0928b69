"""Rewrites of a program. Each says whether it changed anything; `backend` lists those of its two tiers."""
