"""From an optimizer's groups and state to the tensors of a step: nothing here knows a backend."""
