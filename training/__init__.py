"""Training of the weights that ship: data generator, losses, training loop and evaluation."""
