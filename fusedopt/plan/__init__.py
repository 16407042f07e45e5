"""From an optimizer's groups and state to what a step touches: nothing here knows a backend."""
