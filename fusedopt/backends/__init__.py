"""Who runs the verbs of a step; see registry.py for the choice."""
