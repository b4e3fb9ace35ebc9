"""What the running model shows."""
