"""Images to latent shards, and shards to batches whose order is a pure function of the step.

images.py reads image sets, codec.py turns images into latents and back, write.py writes block shards and
their manifest.json (manifest.py), blocks.py reads one block, order.py says which sample stands in which slot of
which step, stream.py brings the last two together.
"""

from dit.errors import UserError


class DataError(UserError):
    """Data that is missing, broken or not what was promised: says which file, where in it, and how to mend it."""
