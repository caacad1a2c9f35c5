"""A page in the browser that draws from a trained model."""
