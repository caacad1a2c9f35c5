"""The schemas of the experiments, and how their parts are made and loaded again."""
