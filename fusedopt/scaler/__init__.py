"""The protocol between a GradScaler and the optimizers."""
