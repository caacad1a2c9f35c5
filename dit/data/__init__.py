"""Images to latent shards, and shards to batches whose order is a pure function of the step.

sources/ reads image sets, codecs/ turns images into latents and back, encoding/ brings them together and writes shards
(shards/write.py, records.py) with their manifest.json (manifest.py); foreign/ takes shards made elsewhere.
storage/ is where files lie; in shards/, blocks.py reads one block of them, verify.py all. In loading/, order.py says
which sample stands in which slot of which step, filler.py and batches.py fill the batches, mixture.py mixes data sets,
quarantine.py does without broken blocks, and stream.py is what training sees of all that.
"""

from dit.errors import UserError


class DataError(UserError):
    """Data that is missing, broken or not what was promised: says which file, where in it, and how to mend it."""
