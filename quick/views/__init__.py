"""What TensorBoard and `predict.py --show` draw."""
