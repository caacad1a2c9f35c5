"""What a training run would need on machines that are not at hand: estimates, each with what it assumes."""
