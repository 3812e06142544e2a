"""The activations that our own networks can have."""

from torch import nn

ACTIVATIONS = {"none": lambda: None, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid}
