"""Speed and memory of training steps on one GPU, and of the plain loop beside them."""
