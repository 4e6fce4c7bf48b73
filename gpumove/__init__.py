"""gpumove moves running PyTorch training jobs between GPU clouds."""
