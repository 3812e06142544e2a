"""Values that some settings choose from, by name; checkpoints tell them too."""

INTERPOLATIONS = ("bilinear", "bicubic")
FITS = ("crop", "pad", "squash")  # what becomes of pictures that are not square
STEMS = ("standard", "small")
LOSSES = ("cross_entropy", "mse", "l1")
TTA = ("none", "mirror", "shift")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
