"""What the weights say about high-norm tokens."""
