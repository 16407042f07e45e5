"""What passes between a GradScaler and the optimizers."""
