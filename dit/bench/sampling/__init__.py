"""How exact solvers are, and how quickly images are drawn."""
