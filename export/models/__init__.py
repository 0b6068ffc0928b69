"""Models on disk: what they are, and every reason to refuse one."""
