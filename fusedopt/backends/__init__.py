"""The backends, which run the verbs of a step; registry.py chooses one."""
