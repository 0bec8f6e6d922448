"""Training: the step, the loop around it, checkpoints, metrics and stopping on request."""
