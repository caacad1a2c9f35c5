"""The data set on disk: manifest, records, blocks; writing, reading and verifying them."""
