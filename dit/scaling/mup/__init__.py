"""How learning rates and activations go with the width: maximal updates (mup) beside the standard parametrization."""
