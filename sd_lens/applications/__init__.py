"""What the explanations are good for: quantization that spares the right layers, and signatures of models."""
